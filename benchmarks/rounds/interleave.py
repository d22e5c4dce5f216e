"""Run systems round by round in turn, so that a busy machine slows all of them alike."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.rounds.child import Child, Reading, find_system
from benchmarks.rounds.task import Task
from fedmerge.errors import InvalidOption

__all__ = ["Measured", "measure"]

_RAY_WORKERS = 2


@dataclass(frozen=True)
class Measured:
    """What one system took on one task.

    Parameters
    ----------
    system, task
        Who did what.
    seconds_to_first_round
        From the start of its process to the end of its first round, imports and data included.
    readings
        One for each round.
    """

    system: str
    task: Task
    seconds_to_first_round: float
    readings: tuple[Reading, ...]

    @property
    def cpu_seconds(self) -> float:
        """CPU time of a round, all its processes: the median over all rounds but the first."""
        return median(reading.cpu for reading in self.readings[1:])

    @property
    def wall_seconds(self) -> float:
        """The same in wall time."""
        return median(reading.wall for reading in self.readings[1:])

    @property
    def peak_mib(self) -> float:
        """Most memory, all its processes."""
        return max(reading.peak_mib for reading in self.readings)

    @property
    def accuracy(self) -> float:
        """Share of the test set that the last model gets right."""
        return self.readings[-1].accuracy or 0.0


def measure(task: Task, systems: Sequence[str]) -> list[Measured]:
    """Run `systems` on one task, each in a fresh process, a round of one and then a round of the next.

    Raises
    ------
    UnknownName
        A system that does not exist.
    InvalidOption
        Fewer than two rounds.
    FedMergeError
        A system failed.
    """
    if task.rounds < 2:
        raise InvalidOption(f"rounds must be at least 2, for the first is not counted; got {task.rounds}")
    for system in systems:
        find_system(system)
    with ExitStack() as stack:
        children = []
        for system in systems:
            workers = max(task.workers, _RAY_WORKERS) if system == "fedmerge-ray" else task.workers
            child = stack.enter_context(Child(system, replace(task, workers=workers)))
            # Its first round right away: from start to first round nobody else of ours runs.
            child.step()
            children.append(child)
        for _ in range(1, task.rounds):
            for child in children:
                child.step()
    return [Measured(c.system, c.task, c.seconds_to_first_round, tuple(c.readings)) for c in children]
