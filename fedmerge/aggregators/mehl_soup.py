"""MEHL-Soup: a soup whose coefficients are learnt on the hyperplane through the models, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fedmerge.aggregators.searched import Searched
from fedmerge.curvature.collected import Collected
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.searching.descent import Descent
from fedmerge.searching.search import Problem, Search, Span
from fedmerge.state import State
from fedmerge.statistics import LossSlopes, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["MehlSoup"]

_APART = 1e-6
"""Of a tensor's norm: what equal models differ by from their mean is rounding, and no direction."""


@register("mehl_soup", paper="arXiv:2407.03641")
@dataclass(frozen=True)
class MehlSoup(Searched):
    """The clients' mean, moved within their hyperplane by learnt coefficients, a set for every tensor.

    Li et al. 2024: ``theta = c + sum_i x_i (theta_i - c) / ||theta_i - c||`` for every tensor, c the models' mean:
    whatever the x_i, the models' coefficients add up to 1, and some may be negative. AdamW on labelled loss, from
    x = 0, its learning rate falling along a cosine. The authors take models in small batches to save memory, and
    c anew from each; here all clients are taken at once, and c is their mean by examples. Equal models are left as they
    are; no base is needed.

    Parameters
    ----------
    learning_rate
        Of AdamW, above 0: about what a tensor moves towards a client in the first steps, in the norm of its entries.
    weight_decay
        Pulls towards the mean, at least 0.
    evaluations, judge
        Steps; who measures. See :class:`~fedmerge.aggregators.searched.Searched`.

    Examples
    --------
    >>> import fedmerge
    >>> net, other, batch = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), (torch.eye(2), torch.arange(2))
    >>> merged = fedmerge.merge([net, other], "mehl_soup", data=[batch], evaluations=3)
    """

    learning_rate: float = 0.05
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "learning_rate", 1e-12, float("inf"), open_high=True)
        check_range(self, "weight_decay", 0.0, float("inf"), open_high=True)

    @property
    def measured_in_search(self) -> tuple[Statistic, ...]:
        """The loss and its slopes."""
        return (LossSlopes(),)

    def span(self, updates: Sequence[ClientUpdate], context: MergeContext, memory: State) -> Span:
        """The mean, and unit steps from it to every client, tensor by tensor."""
        mean = Collected.of(updates).mean
        directions = tuple(_units([update.state for update in updates], mean))
        return Span(mean, directions, torch.zeros(len(directions), dtype=torch.float64))

    def search(self, problem: Problem) -> Search:
        """AdamW, its learning rate falling along a cosine."""
        return Descent(self.evaluations, self.learning_rate, self.weight_decay, cosine=True).search(
            problem, LossSlopes()
        )


def _units(states: Sequence[State], mean: State) -> Iterator[State]:
    """``(theta_i - c) / ||theta_i - c||`` for each model and tensor that is apart from the mean."""
    for state in states:
        for name, tensor in state.items():
            step = tensor.double() - mean[name].double()
            length = float(step.norm())
            if length > _APART * float(tensor.double().norm()):
                yield {name: step / length}
