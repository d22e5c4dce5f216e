"""CPU seconds that each method takes to merge, with more clients and with wider models.

    python benchmarks/merging.py [--methods fedavg,otfusion] [--clients 2,5,10,20] [--widths 50,100,200] [--repeats 3]

MLPs 784-h-10 a little apart from one common initialisation. Clients grow at width 100, the width grows at 5 clients.
Statistics that a method needs are measured beforehand, on 64 random examples a client, and not counted. Prints a line
of JSON for each method and size: the least of the repeats, after a first merge that pays for imports and tracing.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor, nn

import fedmerge

CLIENTS, WIDTH = 5, 100


def model(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))


def near(base: nn.Module, width: int, client: int) -> nn.Module:
    """A model some way off `base`, as if trained."""
    draw, moved = torch.Generator().manual_seed(client + 1), model(width)
    with torch.no_grad():
        for target, start in zip(moved.parameters(), base.parameters(), strict=True):
            target.copy_(start + 0.01 * torch.randn(start.shape, generator=draw))
    return moved


def batch(client: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1000 + client)
    return [(torch.randn(64, 1, 28, 28, generator=draw), torch.randint(0, 10, (64,), generator=draw))]


def seconds(info: fedmerge.MethodInfo, clients: int, width: int, repeats: int) -> float:
    torch.manual_seed(0)
    base = model(width)
    models = [near(base, width, client) for client in range(clients)]
    loaders = [batch(client) for client in range(clients)]
    keywords: dict[str, Any] = {"base": base, "example": loaders[0][0][0][:2]}
    if info.requires_data:
        keywords["data"] = loaders[0]
    if info.needs:
        # Steps are counted while training; nothing can measure them afterwards.
        wanted = [name for name in info.needs if name != "local_steps"]
        statistics = [dict(fedmerge.compute_statistics(m, x, wanted)) for m, x in zip(models, loaders, strict=True)]
        keywords["statistics"] = [{"local_steps": 4.0 + i, **measured} for i, measured in enumerate(statistics)]
    taken = []
    for _ in range(repeats + 1):
        started = time.process_time()
        fedmerge.merge(models, info.name, **keywords)
        taken.append(time.process_time() - started)
    return min(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(fedmerge.methods()))
    parser.add_argument("--clients", default="2,5,10,20")
    parser.add_argument("--widths", default="50,100,200")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [(int(n), WIDTH) for n in arguments.clients.split(",")]
    sizes += [(CLIENTS, int(width)) for width in arguments.widths.split(",") if (CLIENTS, int(width)) not in sizes]
    for name in arguments.methods.split(","):
        for clients, width in sizes:
            row: dict[str, Any] = {"method": name, "clients": clients, "width": width}
            try:
                row["cpu_seconds"] = round(seconds(fedmerge.methods()[name], clients, width, arguments.repeats), 5)
            except fedmerge.FedMergeError as error:  # one that needs exchanges with live clients, say
                row["skipped"] = str(error)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
