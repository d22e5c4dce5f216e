"""The output layer as one ridge regression on all clients' examples, whoever holds which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.questions import Question
from fedmerge.refine.refinement import Proposal, Refinement, Step, Sums
from fedmerge.refine.ridge_head import head_of, ridge_weights
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import HeadSums, Statistic

__all__ = ["AnalyticHead"]


@register("analytic_head", paper="arXiv:2405.16240")
@dataclass(frozen=True)
class AnalyticHead(Refinement):
    """The ridge regression of one-hot labels on the merged model's features, of all examples, taken as it is.

    AFL (He et al. 2025): ``W = C (S + ridge tr(S)/d I)^-1`` of sums over clients is the regression on pooled data,
    however these are divided among clients. So every example is measured, none is held out to judge, and the head is
    taken whatever it is worth; :class:`~fedmerge.refine.RidgeHead` lets clients judge it and choose its scale.

    Parameters
    ----------
    ridge
        In units of the mean of S's diagonal, above 0.
    scale
        Of the head, above 0: changes no decision. Regression on one-hot labels is far less sure than a softmax.
    """

    ridge: float = 1e-3
    scale: float = 1.0

    fits_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, "ridge", 1e-12, float("inf"), open_high=True)
        check_range(self, "scale", 1e-12, float("inf"), open_high=True)

    def steps(self, state: State) -> tuple[Step, ...]:
        """One."""
        return (AnalyticStep(self.ridge, self.scale),)


@dataclass(frozen=True)
class AnalyticStep(Step):
    """Replace the head."""

    expensive: ClassVar[bool] = True  # asked by itself, for no example may be left out to judge another step

    ridge: float
    scale: float

    def needs(self) -> tuple[Statistic, ...]:
        """Second moments of features."""
        return (HeadSums(),)

    def question(self, state: State, memory: State) -> Question:
        """Of all examples."""
        return Question(state, holdout=0)

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """The regression instead of the head, unjudged."""
        head_sums = sums["head_sums"]
        if not head_sums:
            raise InvalidOption("the output layer is frozen (requires_grad=False): there is no head to fit")
        weight = next(iter(head_sums)).rpartition(".")[0]
        matrix = head_of(state, head_sums, head_sums[f"{weight}.S"])
        head = self.scale * ridge_weights(head_sums[f"{weight}.S"], head_sums[f"{weight}.C"], self.ridge)
        step = {name: tensor - state[name].double() for name, tensor in matrix.scatter(head[None]).items()}
        return Proposal((step,), ((1.0,),), 0), {}
