"""The record of a run as an observer: writes its rows and checkpoints, and puts it in its place at the end."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedmerge.observers import Ending, Observer
from fedmerge.observers.observer import Row
from fedmerge.records.run_records import RunRecord
from fedmerge.simulation.runs.snapshot import snapshot
from fedmerge.strategies import MergeStrategy

__all__ = ["Keeping"]


class Keeping(Observer):
    """Keeps the record of a run.

    Parameters
    ----------
    record
        Where rows and checkpoints go.
    strategy, grid
        What is remembered between rounds, beside the global model.
    """

    def __init__(self, record: RunRecord, strategy: Strategy, grid: Grid) -> None:
        self._record, self._strategy, self._grid = record, strategy, grid

    def round_done(self, row: Row, state: Mapping[str, Tensor]) -> None:
        """Write the row, then what it takes to go on from here."""
        self._record.append(row)
        memory = self._strategy.memory if isinstance(self._strategy, MergeStrategy) else {}
        taken = snapshot(self._strategy, self._grid)
        self._record.checkpoint(row["round"], state, memory, sections=taken.sections, facts=taken.facts)

    def ended(self, ending: Ending) -> None:
        """The record is complete, unless something kept the run from its end."""
        if ending.error is None:
            self._record.finish()
