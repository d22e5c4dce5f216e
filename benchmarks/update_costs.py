"""CPU seconds and memory of edits and of methods on task vectors, with 20 clients of ten million parameters.

Each method runs in a process of its own: `python benchmarks/update_costs.py --methods ties dare+fedavg`. Memory is
the most that the process held while it merged, above what it held before, in models of single precision. It is taken
in a second run, in which the C library gives back at once what is free: else it counts what it keeps for later, too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time

import psutil
import torch

from fedmerge import ClientUpdate, MergeContext
from fedmerge.merging import build_pipeline

METHODS = [f"{edit}+fedavg" for edit in ("trim", "trim(scope=tensor)", "dare", "della", "breadcrumbs", "clip", "lines")]
METHODS += ["fedavg", "task_arithmetic", "ties", "slerp", "multislerp", "karcher", "model_stock", "fedgma"]
METHODS += ["magmax", "consensus", "tall_masks", "emr", "iso_c", "tsv_m", "wudi"]


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Parameters of a perceptron with three wide layers, or of a ResNet-18."""
    if kind == "mlp":
        sizes = [(2048, 1024), (2048, 2048), (1792, 2048), (10, 1792)]
        return {f"{i}.weight": size for i, size in enumerate(sizes)} | {
            f"{i}.bias": size[:1] for i, size in enumerate(sizes)
        }
    widths, made = [64, 64, 128, 256, 512], {"stem.weight": (64, 3, 3, 3)}
    for stage in range(1, 5):
        for block in range(2):
            inputs = widths[stage - 1] if block == 0 else widths[stage]
            made[f"{stage}.{block}.conv1"] = (widths[stage], inputs, 3, 3)
            made[f"{stage}.{block}.conv2"] = (widths[stage], widths[stage], 3, 3)
            made |= {f"{stage}.{block}.norm{i}": (widths[stage],) for i in (1, 2)}
    return made | {"head.weight": (10, 512), "head.bias": (10,)}


def measure(method: str, kind: str, clients: int) -> tuple[float, float]:
    """CPU seconds, and the most memory in models."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes(kind).items()}
    size = sum(tensor.numel() for tensor in base.values())
    updates = [
        ClientUpdate(i, {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()}, 1.0 + i % 3)
        for i in range(clients)
    ]
    pipeline, process, peaks = build_pipeline(method), psutil.Process(), []
    before, merged = process.memory_info().rss, threading.Event()

    def watch() -> None:
        while not merged.wait(0.01):
            peaks.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.process_time()
    try:
        pipeline.merge(updates, MergeContext(base=base), buffers=())
    finally:
        merged.set()
        watcher.join()
    cpu = time.process_time() - started
    return cpu, (max(peaks, default=before) - before) / (4 * size)


def main() -> None:
    """Measure each method in a process of its own, or in this one where one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--models", nargs="+", default=["mlp", "resnet"], choices=["mlp", "resnet"])
    parser.add_argument("--clients", type=int, default=20)
    options = parser.parse_args()
    if len(options.methods) == len(options.models) == 1:
        print(*measure(options.methods[0], options.models[0], options.clients))
        return
    print("| method | model | CPU seconds | memory in models |\n| --- | --- | --- | --- |", flush=True)
    for method in options.methods:
        for kind in options.models:
            alone = [sys.executable, __file__, "--methods", method, "--models", kind, "--clients", str(options.clients)]
            rows = []
            for settings in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
                ran = subprocess.run(alone, check=True, capture_output=True, text=True, env=os.environ | settings)
                rows.append(ran.stdout.split())
            print(f"| `{method}` | {kind} | {float(rows[0][0]):.1f} | {float(rows[1][1]):.1f} |", flush=True)


if __name__ == "__main__":
    main()
