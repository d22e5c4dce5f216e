"""LoraHub: coefficients of the clients' updates found without gradients, few and small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.aggregators.searched import Searched
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.searching.evolution import Evolution
from fedmerge.searching.search import Problem, Search, Span, task_vectors
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["LoraHub"]


@register("lorahub", paper="arXiv:2307.13269")
@dataclass(frozen=True)
class LoraHub(Searched):
    """Updates composed by one coefficient each, sought without gradients on loss plus a price on coefficients.

    Huang et al. 2023: ``min_w loss(theta_0 + sum_i w_i tau_i) + price mean|w_i|`` over ``|w_i| <= bound``, from w = 0.
    The authors compose the factors of low-rank adapters, ``A = sum w_i A_i`` and ``B = sum w_i B_i``; here any tensors
    that clients train are composed so, relative to the model sent out. Where these are such pairs, their product is
    quadratic in w. CMA-ES takes the place of nevergrad's optimiser: candidates of one generation are judged in one
    exchange, and no gradient is taken.
    Needs the library ``cma``: ``pip install 'fedmerge[search]'``.

    Parameters
    ----------
    bound
        Largest coefficient, above 0.
    price
        Of the mean absolute coefficient, in units of the loss, at least 0.
    initial
        Of every coefficient, at most `bound`: 0 is the model sent out.
    sigma
        Initial standard deviation of coefficients, above 0.
    evaluations, judge
        Candidates; who judges. See :class:`~fedmerge.aggregators.searched.Searched`.

    Examples
    --------
    >>> LoraHub().bound
    1.5
    """

    requires_base: ClassVar[bool] = True

    bound: float = 1.5
    price: float = 0.05
    initial: float = 0.0
    sigma: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "bound", 1e-12, float("inf"), open_high=True)
        check_range(self, "price", 0.0, float("inf"), open_high=True)
        check_range(self, "sigma", 1e-12, float("inf"), open_high=True)
        check_range(self, "initial", -self.bound, self.bound)

    def span(self, updates: Sequence[ClientUpdate], context: MergeContext, memory: State) -> Span:
        """The model sent out, and task vectors."""
        base = context.required_base("lorahub")
        start = torch.full((len(updates),), self.initial, dtype=torch.float64)
        return Span(base, task_vectors([update.state for update in updates], base), start)

    def search(self, problem: Problem) -> Search:
        """CMA-ES within the bounds."""

        def priced(coefficients: Tensor) -> Tensor:
            return self.price * coefficients.abs().mean(1)

        evolution = Evolution(self.evaluations, self.sigma, low=-self.bound, high=self.bound)
        return evolution.search(problem, problem.start, penalty=priced)
