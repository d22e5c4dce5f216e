"""A task vector of which the largest numbers are left, and no second copy is made."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedmerge.aggregators.task_vector_fold import TaskVector
from fedmerge.edits.largest import Cut, cuts
from fedmerge.state import State
from fedmerge.update import ClientUpdate

__all__ = ["TrimmedVector"]


class TrimmedVector(TaskVector):
    """``tau = theta_i - theta_0`` with all but its largest numbers 0: what the edit ``trim`` leaves, piece by piece.

    Parameters
    ----------
    update, base
        The client's model and weight, and theta_0.
    density, scope
        See :class:`~fedmerge.edits.trim.Trim`.
    """

    def __init__(self, update: ClientUpdate, base: State, density: float, scope: Literal["global", "tensor"]) -> None:
        super().__init__(update, base)
        self._whole = TaskVector(update, base)
        self._cuts: dict[str, Cut] = {}
        groups = [list(self)] if scope == "global" else [[name] for name in self]
        for names in groups:
            count = round(density * sum(update.state[name].numel() for name in names))
            self._cuts |= cuts({name: partial(self._pieces, name) for name in names}, count)

    def _pieces(self, name: str) -> Iterator[Tensor]:
        return (piece for _, piece in self._whole.pieces(name))

    def __getitem__(self, name: str) -> Tensor:
        whole = self._whole[name]
        return torch.cat([piece for _, piece in self.pieces(name)]).view(whole.shape) if whole.numel() else whole

    def pieces(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Parts of one tensor in a row, with their places; whoever takes one may change it."""
        masks = self._cuts[name].masks(self._pieces(name))
        for (part, piece), mask in zip(self._whole.pieces(name), masks, strict=True):
            yield part, piece.mul_(mask)
