"""``fedmerge bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["bench"]


def bench(
    workloads: Annotated[str, typer.Option(help="By comma.")] = "W1,W2,W3,W3-million",
    systems: Annotated[
        str, typer.Option(help="By comma: loop, stacked, fedmerge, fedmerge-ray.")
    ] = "loop,stacked,fedmerge",
    workers: Annotated[int, typer.Option(min=1, help="Of fedmerge; more than 1 are Ray actors.")] = 1,
    rounds: Annotated[
        int | None, typer.Option(min=2, help="Instead of each workload's own; the first is not counted.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda adds W1 and W2 on the GPU.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of data, model, sampling and batches.")] = 0,
    data_dir: Annotated[Path | None, typer.Option(help="Where data sets lie. Default: $FEDMERGE_DATA.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each workload and system.")] = False,
) -> None:
    """Measure simulated rounds beside plain PyTorch that does the same work, in turn within one run."""
    from fedmerge.bench.command import run_bench
    from fedmerge.bench.report import speed_table
    from fedmerge.commands.tables import show

    measured = []
    for row in run_bench(
        _split(workloads), _split(systems), workers=workers, rounds=rounds, device=device, seed=seed, data_dir=data_dir
    ):
        measured.append(row)
        if as_json:
            typer.echo(json.dumps(row))
    if not as_json:
        show(speed_table(measured))


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
