"""Merging adapters of a layer too large for full matrices: seconds, and memory in units of the clients' adapters.

Run ``python benchmarks/adapter_merging.py`` for a layer of 1,000,000 x 1,024 at rank 16 and 20 clients, or give smaller
sizes: ``--out 20000 --width 512 --rank 8 --clients 5``. Each method runs in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time

import torch

from fedmerge import ClientUpdate, MergeContext
from fedmerge.adapters import Term, total
from fedmerge.merging import build_pipeline

METHODS = ("fedit", "flexlora", "core_space", "core_space(combine='ties(density=0.2)')", "residual")
"""``residual`` is what FedEx-LoRA adds to the base, M less the product of the means, as one pair of factors."""


def clients(out: int, width: int, rank: int, number: int) -> list[ClientUpdate]:
    """Clients with factors of their own."""
    draw, sent = torch.Generator().manual_seed(0), []
    for i in range(number):
        a, b = torch.randn(rank, width, generator=draw), torch.randn(out, rank, generator=draw)
        sent.append(ClientUpdate(i, {"layer.lora_A.weight": a, "layer.lora_B.weight": b}, 1.0 + i))
    return sent


def merge(method: str, sent: list[ClientUpdate]) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged B and A."""
    if method != "residual":
        state = build_pipeline(method).merge(sent, MergeContext()).state
        return state["layer.lora_B.weight"], state["layer.lora_A.weight"]
    mean = build_pipeline("fedit").merge(sent, MergeContext()).state
    whole = sum(update.weight for update in sent)
    terms = [Term(u.state["layer.lora_B.weight"], u.state["layer.lora_A.weight"], u.weight / whole) for u in sent]
    return total([*terms, Term(mean["layer.lora_B.weight"], mean["layer.lora_A.weight"], -1.0)])


def wrong_by(method: str, sent: list[ClientUpdate], b: torch.Tensor, a: torch.Tensor) -> float:
    """How far some rows of the result are from those of the mean, relative to it; NaN where it is no mean."""
    if method == "residual":
        mean = build_pipeline("fedit").merge(sent, MergeContext()).state
        b = torch.cat([b, mean["layer.lora_B.weight"]], 1)
        a = torch.cat([a, mean["layer.lora_A.weight"]])
    rows, whole = slice(0, 1000), sum(update.weight for update in sent)
    want = sum(
        u.weight / whole * u.state["layer.lora_B.weight"][rows].double() @ u.state["layer.lora_A.weight"].double()
        for u in sent
    )
    return float((b[rows].double() @ a.double() - want).norm() / torch.as_tensor(want).norm())


def measured(method: str, sizes: tuple[int, int, int, int]) -> None:
    """Print a line of the table."""
    sent = clients(*sizes)
    adapters = sum(t.numel() * t.element_size() for update in sent for t in update.state.values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, processor = time.perf_counter(), time.process_time()
    b, a = merge(method, sent)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    error = wrong_by(method, sent, b, a)
    print(
        f"{method:40} {seconds:8.1f} s {processor:8.1f} s of processor  {adapters / 1e6:8.1f} MB of adapters, "
        f"{peak / adapters:5.2f} times that beside them; off the mean by {error:.1e}"
    )
    sys.stdout.flush()


def main() -> None:
    """Measure every method."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, usual in (("out", 1_000_000), ("width", 1024), ("rank", 16), ("clients", 20)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    given = parser.parse_args()
    sizes = given.out, given.width, given.rank, given.clients
    print(f"layer of {sizes[0]} x {sizes[1]}, rank {sizes[2]}, {sizes[3]} clients")
    for method in METHODS:
        process = multiprocessing.get_context("spawn").Process(target=measured, args=(method, sizes))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
