"""Evolutionary merging: weights of the clients' models found by CMA-ES."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmerge.aggregators.searched import Searched, shares, vectors_by
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.searching.evolution import Evolution
from fedmerge.searching.search import Problem, Search, Span
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Evolutionary"]


@register("evolutionary", paper="arXiv:2403.13187")
@dataclass(frozen=True)
class Evolutionary(Searched):
    """Weights of the clients' models that CMA-ES evolves, candidate after candidate judged by its loss.

    Akiba et al. 2024, search in parameter space: a genome of one weight per model, or per model and tensor, is evolved
    from the clients' shares; each candidate is merged and judged. Under ``rule="linear"`` the weights of a tensor are
    divided by their sum, so that equal models stay as they are; ``"task_arithmetic"`` adds task vectors times the
    weights to the model sent out. Negative genes count by their absolute value unless negative weights are allowed.
    Candidates of one generation are judged in one exchange. Needs the library ``cma``:
    ``pip install 'fedmerge[search]'``.

    Parameters
    ----------
    rule
        How weights merge models.
    granularity
        ``"model"`` or ``"tensor"``.
    sigma
        Initial standard deviation of weights, above 0.
    population
        Candidates of a generation, at least 3; ``4 + floor(3 ln m)`` of m weights where not given.
    negative
        Whether weights may be negative.
    evaluations, judge
        Candidates; who judges. See :class:`~fedmerge.aggregators.searched.Searched`.

    Examples
    --------
    >>> Evolutionary().evaluations
    40
    """

    requires_base: ClassVar[bool] = True

    rule: Literal["linear", "task_arithmetic"] = "linear"
    granularity: Literal["model", "tensor"] = "model"
    sigma: float = 1 / 6
    population: int | None = None
    negative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "sigma", 1e-12, float("inf"), open_high=True)
        if self.population is not None:
            check_range(self, "population", 3, float("inf"), open_high=True)
        if self.rule not in ("linear", "task_arithmetic"):
            raise InvalidOption(f'Evolutionary: rule must be "linear" or "task_arithmetic", got {self.rule!r}')
        if self.granularity not in ("model", "tensor"):
            raise InvalidOption(f'Evolutionary: granularity must be "model" or "tensor", got {self.granularity!r}')

    def span(self, updates: Sequence[ClientUpdate], context: MergeContext, memory: State) -> Span:
        """The model sent out, and task vectors."""
        base = context.required_base("evolutionary")
        return Span(base, *vectors_by(updates, base, shares(updates), self.granularity))

    def search(self, problem: Problem) -> Search:
        """CMA-ES."""
        start, models = problem.start, problem.models

        def decoded(genomes: Tensor) -> Tensor:
            weights = genomes if self.negative else genomes.abs()
            if self.rule == "linear":
                table = weights.reshape(len(weights), models, -1)
                total = table.sum(1, keepdim=True)
                weights = (table / torch.where(total.abs() > 1e-9, total, 1e-9)).flatten(1)
            return weights

        return Evolution(self.evaluations, self.sigma, self.population).search(problem, start, decoded)
