"""The output layer as the exact ridge classifier of all clients' features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.refine.refinement import Proposal, Refinement, Step, Sums
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import HeadSums, Statistic
from fedmerge.statistics.measuring.weight_matrices import WeightMatrix

__all__ = ["RidgeHead", "head_of", "ridge_proposal", "ridge_weights"]

_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Of the classifier: regression on one-hot labels decides rightly but is far less sure than a softmax should be."""
_LIKELY = 16.0
_FACTORS = (1.0, 10.0, 100.0)
"""Times the ridge: more where moments came through lossy compression, or from few examples."""


@register("ridge_head", paper="docs/beyond.md")
@dataclass(frozen=True)
class RidgeHead(Refinement):
    """Ridge regression of one-hot labels on the merged model's features, solved exactly from two sums.

    ``W = C (S + ridge tr(S)/d I)^-1`` with ``S = mean h h^T`` and ``C = mean onehot(y) h^T`` over all examples of all
    clients: the classifier that one would fit with all features in one place (AFL, CVPR 2025). Its scale, which changes
    no decision, is chosen by held-out cross-entropy.

    Parameters
    ----------
    ridge
        In units of the mean of S's diagonal, above 0.
    examples
        At most so many of each client are measured; all where not given.
    """

    ridge: float = 1e-3
    examples: int | None = None

    fits_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, "ridge", 1e-12, float("inf"), open_high=True)

    def steps(self, state: State) -> tuple[Step, ...]:
        """One."""
        return (RidgeStep(self.ridge, self.examples),)


@dataclass(frozen=True)
class RidgeStep(Step):
    """Replace the head."""

    ridge: float
    examples: int | None

    def needs(self) -> tuple[Statistic, ...]:
        """Second moments of features."""
        return (HeadSums(examples=self.examples),)

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """The ridge classifier at several scales instead of the head."""
        return ridge_proposal(state, sums["head_sums"], self.ridge)[0], {}


def ridge_proposal(state: State, sums: Mapping[str, Tensor], ridge: float) -> tuple[Proposal, Tensor]:
    """The ridge classifier at several scales instead of the head, and the features' moments S.

    Raises
    ------
    InvalidOption
        Nothing is measured at the head.
    """
    if not sums:
        raise InvalidOption(
            "there is no head to fit: the output layer is frozen (requires_grad=False), personal or not linear, or "
            "some labels of an example count and others do not"
        )
    weight = next(iter(sums)).rpartition(".")[0]
    moments = sums[f"{weight}.S"]
    matrix = head_of(state, sums, moments)
    away = {name: -state[name].double() for name in matrix.names}
    classifiers = [ridge_weights(moments, sums[f"{weight}.C"], factor * ridge) for factor in _FACTORS]
    points = [(0.0,) * (1 + len(_FACTORS))]
    for chosen in range(len(_FACTORS)):
        points += [(1.0, *(scale * (i == chosen) for i in range(len(_FACTORS)))) for scale in _SCALES]
    directions = away, *(matrix.scatter(classifier[None]) for classifier in classifiers)
    return Proposal(directions, tuple(points), 1 + _SCALES.index(_LIKELY)), moments


def ridge_weights(moments: Tensor, labelled: Tensor, ridge: float) -> Tensor:
    """``C (S + ridge tr(S)/d I)^-1``, [classes, d].

    Examples
    --------
    >>> ridge_weights(torch.eye(2), torch.ones(1, 2), 1.0)
    tensor([[0.5000, 0.5000]])
    """
    size = len(moments)
    damped = moments + ridge * moments.trace() / size * torch.eye(size, dtype=moments.dtype, device=moments.device)
    solved: Tensor = torch.linalg.solve(damped, labelled.T)
    return solved.T


def head_of(state: State, sums: Mapping[str, Tensor], moments: Tensor) -> WeightMatrix:
    """The matrix that a head's statistic is about, with its bias where the moments have a row for it."""
    return WeightMatrix.measured_by(next(iter(sums)).rpartition(".")[0], moments, state)
