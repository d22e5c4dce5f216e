"""A task vector of which the largest numbers are left, and no second copy is made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fedmerge.aggregators.task_vector_fold import TaskVector
from fedmerge.edits.largest import kth_largest
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
        groups = [list(self)] if scope == "global" else [[name] for name in self]
        self._thresholds: dict[str, float] = {}
        self._equal: dict[str, int] = {}  # how many numbers of a tensor stay that are just as large as the threshold
        for names in groups:
            self._trim(names, round(density * sum(update.state[name].numel() for name in names)))

    def _trim(self, names: list[str], count: int) -> None:
        threshold = kth_largest(lambda: self._sizes(names), count) if count > 0 else math.inf
        larger, equal = 0, {}
        for name in names:
            equal[name] = 0
            for piece in self._sizes([name]):
                larger += int((piece > threshold).sum())
                equal[name] += int((piece == threshold).sum())
        left = count - larger
        for name in names:
            self._thresholds[name], self._equal[name] = threshold, min(left, equal[name])
            left -= self._equal[name]

    def _sizes(self, names: list[str]) -> Iterator[Tensor]:
        for name in names:
            for _, piece in self._whole.pieces(name):
                yield piece.abs_()

    def __getitem__(self, name: str) -> Tensor:
        whole = self._whole[name]
        return torch.cat([piece for _, piece in self.pieces(name)]).view(whole.shape) if whole.numel() else whole

    def pieces(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Parts of one tensor in a row, with their places; whoever takes one may change it."""
        threshold, left = self._thresholds[name], self._equal[name]
        for part, piece in self._whole.pieces(name):
            sizes = piece.abs()
            kept = sizes > threshold
            if left:  # of equal ones, those that come first
                first = (sizes == threshold).nonzero().flatten()[:left]
                kept[first] = True
                left -= len(first)
            yield part, piece.mul_(kept)
