"""Rows and a table of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

from rich.table import Table

from benchmarks.rounds.interleave import Measured

__all__ = ["Row", "rows", "speed_table"]


class Row(TypedDict):
    """One line of ``fedmerge bench --json``; ratios are over the plain loop, None where it did not run."""

    workload: str
    system: str
    cpu_ms_per_update: float
    cpu_ratio: float | None
    wall_ratio: float | None
    peak_mib: float
    accuracy: float
    seconds_to_first_round: float
    cpu_seconds_to_first_round: float
    rounds: int
    workers: int
    engine: str
    device: str
    data: str


def rows(measured: Sequence[Measured]) -> list[Row]:
    """A row for each system of one task."""
    loop = next((reading for reading in measured if reading.system == "loop"), None)
    return [_row(reading, loop) for reading in measured]


def _row(measured: Measured, loop: Measured | None) -> Row:
    workload, ours = measured.task.workload, measured.system.startswith("fedmerge")
    return Row(
        workload=workload.name,
        system="fedmerge" if ours else measured.system,
        cpu_ms_per_update=round(1000 * measured.cpu_seconds / workload.sampled, 4),
        cpu_ratio=None if loop is None else round(measured.cpu_seconds / loop.cpu_seconds, 3),
        wall_ratio=None if loop is None else round(measured.wall_seconds / loop.wall_seconds, 3),
        peak_mib=round(measured.peak_mib, 1),
        accuracy=round(measured.accuracy, 4),
        seconds_to_first_round=round(measured.seconds_to_first_round, 2),
        cpu_seconds_to_first_round=round(measured.readings[0].cpu_so_far, 2),
        rounds=measured.task.rounds,
        workers=measured.task.workers if ours else 1,
        engine=measured.readings[-1].engine,
        device=measured.task.device,
        data=measured.readings[0].data,
    )


def speed_table(rows: Iterable[Row]) -> Table:
    """The table that a person reads."""
    table = Table(
        title="Medians over all rounds but the first; ratios over the plain PyTorch loop of the same run",
        title_justify="left",
    )
    for name in ("workload", "system", "CPU ms/update", "CPU ratio", "wall ratio", "peak MiB", "accuracy in %"):
        table.add_column(name, justify="left" if name in ("workload", "system") else "right")
    for name in ("s to 1st round", "rounds", "data"):
        table.add_column(name, justify="right")
    for row in rows:
        extra = "" if row["workers"] == 1 else f", {row['workers']} workers"
        extra += "" if row["device"] == "cpu" else f", {row['device']}"
        table.add_row(
            row["workload"],
            row["system"] + extra,
            f"{row['cpu_ms_per_update']:.3f}",
            _ratio(row["cpu_ratio"]),
            _ratio(row["wall_ratio"]),
            f"{row['peak_mib']:.0f}",
            f"{100 * row['accuracy']:.2f}",
            f"{row['seconds_to_first_round']:.1f}",
            str(row["rounds"]),
            row["data"],
        )
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
