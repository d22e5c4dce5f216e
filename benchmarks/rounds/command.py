"""What ``fedmerge bench`` runs: every workload on every system, a workload at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.rounds.child import find_system
from benchmarks.rounds.interleave import measure
from benchmarks.rounds.report import Row, rows
from benchmarks.rounds.task import Task
from benchmarks.rounds.usage import machine
from benchmarks.rounds.workloads import find_workload
from fedmerge.errors import ConfigError

__all__ = ["run_bench"]

_ON_GPU = ("W1", "W2")


def run_bench(
    workloads: Sequence[str],
    systems: Sequence[str],
    *,
    workers: int = 1,
    rounds: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    data_dir: Path | None = None,
) -> Iterator[Row]:
    """Measure, and yield rows as they come; what goes on is told on standard error.

    Parameters
    ----------
    workloads, systems
        Names.
    workers
        Of fedmerge.
    rounds
        Instead of each workload's own number.
    device
        ``"cuda"`` measures W1 and W2 on the GPU besides, where torch sees one.
    seed, data_dir
        See :class:`~benchmarks.rounds.task.Task`.

    Raises
    ------
    UnknownName
        A workload or system that does not exist.
    ConfigError
        None was named.
    """
    chosen = [find_workload(name) for name in workloads]
    for system in systems:
        find_system(system)
    if not chosen or not systems:
        raise ConfigError("name at least one workload and one system")
    tasks = [Task(workload, rounds or workload.rounds, seed, data_dir, workers=workers) for workload in chosen]
    if device == "cuda" and torch.cuda.is_available():
        tasks += [replace(task, device="cuda", workers=1) for task in tasks if task.workload.name in _ON_GPU]
    elif device == "cuda":
        _tell("torch sees no CUDA device: rows on the GPU are skipped")
    _tell(f"machine: {machine()}")
    for task in tasks:
        here = systems if task.device == "cpu" else [name for name in systems if name in ("loop", "fedmerge")]
        if not here:
            continue
        _tell(f"{task.workload.name} on {task.device}: {', '.join(here)}")
        yield from rows(measure(task, here))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
