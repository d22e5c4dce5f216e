"""aTLAS: task vectors scaled anisotropically, by coefficients learnt from labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedmerge.aggregators.searched import Searched, vectors_by
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.searching.descent import Descent
from fedmerge.searching.search import Problem, Search, Span
from fedmerge.state import State
from fedmerge.statistics import LossSlopes, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Atlas"]


@register("atlas", paper="arXiv:2407.02880")
@dataclass(frozen=True)
class Atlas(Searched):
    """Every tensor of every task vector with a coefficient of its own, learnt from the model sent out on labelled loss.

    Zhang et al. 2024: ``theta = theta_0 + sum_i Lambda_i tau_i``, Lambda_i a number per parameter tensor or one per
    model, learnt by AdamW from 0, that is from theta_0, with a learning rate that falls along a cosine. Coefficients
    may be negative. With 0 evaluations it is theta_0; with all coefficients 1/K, FedAvg of equal clients.

    Parameters
    ----------
    granularity
        ``"tensor"``, the authors' blocks, or ``"model"``.
    initial
        Of every coefficient.
    learning_rate
        Of AdamW, above 0: about what a coefficient moves in the first steps.
    weight_decay
        Pulls coefficients towards 0, at least 0.
    evaluations, judge
        Steps; who measures. See :class:`~fedmerge.aggregators.searched.Searched`.

    Examples
    --------
    >>> import fedmerge
    >>> net, other, batch = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), (torch.eye(2), torch.arange(2))
    >>> merged = fedmerge.merge([net, other], "atlas", base=other, data=[batch], evaluations=3)
    """

    requires_base: ClassVar[bool] = True

    granularity: Literal["model", "tensor"] = "tensor"
    initial: float = 0.0
    learning_rate: float = 0.1
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "learning_rate", 1e-12, float("inf"), open_high=True)
        check_range(self, "weight_decay", 0.0, float("inf"), open_high=True)
        if self.granularity not in ("model", "tensor"):
            raise InvalidOption(f'Atlas: granularity must be "model" or "tensor", got {self.granularity!r}')

    @property
    def measured_in_search(self) -> tuple[Statistic, ...]:
        """The loss and its slopes."""
        return (LossSlopes(),)

    def span(self, updates: Sequence[ClientUpdate], context: MergeContext, memory: State) -> Span:
        """The model sent out, and task vectors."""
        base = context.required_base("atlas")
        start = torch.full((len(updates),), self.initial, dtype=torch.float64)
        return Span(base, *vectors_by(updates, base, start, self.granularity))

    def search(self, problem: Problem) -> Search:
        """AdamW, its learning rate falling along a cosine."""
        return Descent(self.evaluations, self.learning_rate, self.weight_decay, cosine=True).search(
            problem, LossSlopes()
        )
