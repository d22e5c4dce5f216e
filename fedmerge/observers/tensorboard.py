"""Curves in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.observers.observer import Ending, Observer, Row, Run, numbers_in
from fedmerge.observers.tracker_library import need
from fedmerge.registry import register

__all__ = ["TensorBoard"]


@register("tensorboard")
@dataclass
class TensorBoard(Observer):
    """Write every number of a row as a scalar of its round, for ``tensorboard --logdir``.

    Wants ``pip install "fedmerge[tensorboard]"``, or else a MissingExtra is raised.

    Parameters
    ----------
    dir
        Where: a folder for each run is made in it. By default each run's own, ``<run>/tensorboard``.
    """

    dir: str = ""
    _library: Any = field(default=None, init=False, repr=False)
    _writer: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._library = need("torch.utils.tensorboard", "tensorboard")

    def began(self, run: Run) -> None:
        """Open the file; what an earlier process wrote of rounds that are done again is hidden."""
        if not self.dir and run.folder is None:
            raise InvalidOption("tensorboard: the run keeps no record to write into: set dir")
        folder = Path(self.dir, run.name) if self.dir else Path(run.folder or "", "tensorboard")
        self._writer = self._library.SummaryWriter(str(folder), purge_step=run.done + 1 if run.rows else None)

    def round_done(self, row: Row, state: Mapping[str, Tensor]) -> None:
        """Write a point of each curve."""
        for name, number in numbers_in(row).items():
            self._writer.add_scalar(name, number, row["round"])

    def ended(self, ending: Ending) -> None:
        """Close the file."""
        if ending.stopped:
            self._writer.add_text("stopped", ending.stopped, ending.round)
        self._writer.close()
