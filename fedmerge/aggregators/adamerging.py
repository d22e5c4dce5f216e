"""AdaMerging: coefficients of task vectors learnt by gradients, on the server or by sums over clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedmerge.aggregators.searched import Searched, shares, vectors_by
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.searching.descent import Descent
from fedmerge.searching.search import Problem, Search, Span
from fedmerge.state import State
from fedmerge.statistics import EntropySlopes, LossSlopes, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["AdaMerging"]

_OBJECTIVES = ("auto", "loss", "entropy")


@register("adamerging", paper="arXiv:2310.02575")
@dataclass(frozen=True)
class AdaMerging(Searched):
    """Task vectors whose coefficients, one a model or one a tensor, are learnt by gradient.

    Yang et al. 2024: ``theta = theta_0 + sum_i lambda_i tau_i`` (task-wise), or with a lambda_i for every tensor
    (layer-wise); Adam minimises the entropy of predictions on unlabelled inputs. The gradient by a coefficient is
    ``<dL/dtheta, tau_i>``, and so a sum over clients: each answers with inner products, and no data leave it. Clients
    have labels, so they answer with the loss unless told otherwise; entropy falls by confident collapse where labels
    are skewed. The authors take 500 steps of 1e-3 on batches of 16 from 0.3 for every model; steps here are gradients
    of all examples, fewer and longer, from FedAvg.

    Parameters
    ----------
    granularity
        ``"tensor"`` for layer-wise, ``"model"`` for task-wise coefficients.
    initial
        Of every coefficient; the clients' shares of the examples, which is FedAvg, where not given. The paper has 0.3.
    learning_rate
        Of Adam, above 0: about what a coefficient moves in a step.
    clamp
        Whether coefficients are kept in [0, 1], as in the authors' code.
    objective
        ``"loss"``; ``"entropy"``, for classifiers; or ``"auto"``: loss where those who judge have labels.
    evaluations, judge
        Steps; who measures. See :class:`~fedmerge.aggregators.searched.Searched`.

    Examples
    --------
    >>> import fedmerge
    >>> net, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    >>> merged = fedmerge.merge([net, other], "adamerging", base=other, data=torch.randn(8, 2), evaluations=3)
    """

    requires_base: ClassVar[bool] = True
    unlabelled: ClassVar[bool] = True

    granularity: Literal["model", "tensor"] = "tensor"
    initial: float | None = None
    learning_rate: float = 0.02
    clamp: bool = False
    objective: Literal["auto", "loss", "entropy"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "learning_rate", 1e-12, float("inf"), open_high=True)
        if self.granularity not in ("model", "tensor"):
            raise InvalidOption(f'AdaMerging: granularity must be "model" or "tensor", got {self.granularity!r}')
        if self.objective not in _OBJECTIVES:
            raise InvalidOption(f"AdaMerging: objective must be of {list(_OBJECTIVES)}, got {self.objective!r}")

    @property
    def measured_in_search(self) -> tuple[Statistic, ...]:
        """The objective and its slopes."""
        return (EntropySlopes() if self.objective == "entropy" else LossSlopes(),)

    def span(self, updates: Sequence[ClientUpdate], context: MergeContext, memory: State) -> Span:
        """The model sent out, and task vectors."""
        base, start = context.required_base("adamerging"), shares(updates)
        if self.initial is not None:
            start = torch.full_like(start, self.initial)
        return Span(base, *vectors_by(updates, base, start, self.granularity))

    def search(self, problem: Problem) -> Search:
        """Adam."""
        entropy = self.objective == "entropy" or (self.objective == "auto" and not problem.labelled)
        low, high = (0.0, 1.0) if self.clamp else (None, None)
        descent = Descent(self.evaluations, self.learning_rate, low=low, high=high)
        return descent.search(problem, EntropySlopes() if entropy else LossSlopes())
