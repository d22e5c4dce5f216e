"""``fedmerge bench``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import fedmerge
from fedmerge.errors import ConfigError

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
    from fedmerge.commands.tables import show

    _make_importable()
    from benchmarks.rounds.command import run_bench
    from benchmarks.rounds.report import speed_table

    measured = []
    for row in run_bench(
        _split(workloads), _split(systems), workers=workers, rounds=rounds, device=device, seed=seed, data_dir=data_dir
    ):
        measured.append(row)
        if as_json:
            typer.echo(json.dumps(row))
    if not as_json:
        show(speed_table(measured))


def _make_importable() -> None:
    """The benchmarks stand beside the package in a checkout, and are not installed with it."""
    checkout = Path(fedmerge.__file__).parents[1]
    if not (checkout / "benchmarks" / "rounds").is_dir():
        raise ConfigError(
            "fedmerge bench runs the benchmarks of a checkout, which are not installed with the package: "
            'clone the repository, install it by `pip install -e ".[sim]"`, and run it from there'
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
