"""Checkpoint merging: how far to go from earlier models to the newest, or among clients, by Bayesian optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmerge.aggregators.searched import Searched, shares
from fedmerge.curvature.collected import Collected
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.searching.bayes_search import BayesSearch
from fedmerge.searching.search import Problem, Search, Span
from fedmerge.state import State, prefixed, with_prefix
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["CheckpointSearch"]


@register("checkpoint_search", paper="arXiv:2403.19390")
@dataclass(frozen=True)
class CheckpointSearch(Searched):
    """A point between the clients' mean and the global models before it, found by Bayesian optimisation.

    Liu et al. 2024: ``theta = lambda theta_t + (1 - lambda) theta_{t-1}`` of adjacent checkpoints, lambda sought by a
    Gaussian process on held-out loss. Here theta_t is the clients' mean and theta_{t-1} the model that the round began
    with; with more `checkpoints` the rest of each step is divided the same way among still earlier ones. With
    ``between="clients"`` the weights of the clients' models are sought instead. The authors choose among acquisition
    functions by GP-Hedge; here it is expected improvement. Candidates are judged one after the other. Needs the
    library ``optuna``: ``pip install 'fedmerge[search]'``.

    Parameters
    ----------
    between
        ``"rounds"`` or ``"clients"``.
    checkpoints
        How many global models, the newest among them, at least 2.
    lowest
        Least lambda, in [0, 1).
    sampler
        ``"gp"``, or ``"tpe"``: Parzen estimators, quicker and coarser.
    evaluations, judge
        Candidates; who judges. See :class:`~fedmerge.aggregators.searched.Searched`.

    Examples
    --------
    >>> CheckpointSearch().checkpoints
    2
    """

    requires_base: ClassVar[bool] = True

    between: Literal["rounds", "clients"] = "rounds"
    checkpoints: int = 2
    lowest: float = 0.0
    sampler: Literal["gp", "tpe"] = "gp"
    evaluations: int = field(default=12, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "checkpoints", 2, float("inf"), open_high=True)
        check_range(self, "lowest", 0.0, 1.0, open_high=True)
        if self.between not in ("rounds", "clients"):
            raise InvalidOption(f'CheckpointSearch: between must be "rounds" or "clients", got {self.between!r}')
        if self.sampler not in ("gp", "tpe"):
            raise InvalidOption(f'CheckpointSearch: sampler must be "gp" or "tpe", got {self.sampler!r}')

    def span(self, updates: Sequence[ClientUpdate], context: MergeContext, memory: State) -> Span:
        """The mean and the steps back to earlier models; or 0 and the clients' models."""
        base = context.required_base("checkpoint_search")
        if self.between == "clients":
            nothing = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in base.items()}
            return Span(nothing, tuple(update.state for update in updates), shares(updates))
        mean = Collected.of(updates).mean
        earlier = [base, *self._earlier(memory)][: self.checkpoints - 1]
        back = tuple({name: state[name].double() - mean[name].double() for name in mean} for state in earlier)
        return Span(mean, back, torch.zeros(len(back), dtype=torch.float64))

    def search(self, problem: Problem) -> Search:
        """One candidate after the other."""
        box = BayesSearch(self.evaluations, self.lowest, 1.0, self.sampler)
        if self.between == "clients":
            return box.search(problem, problem.start / problem.start.max(), _normalised)
        return box.search(problem, torch.ones_like(problem.start), rests)

    def remember(self, updates: Sequence[ClientUpdate], context: MergeContext, memory: State) -> State:
        """Models that earlier rounds began with, the newest first."""
        if self.between == "clients" or self.checkpoints == 2:
            return {}
        known = [context.required_base("checkpoint_search"), *self._earlier(memory)][: self.checkpoints - 2]
        kept: dict[str, Tensor] = {}
        for number, state in enumerate(known):
            kept |= with_prefix(f"model{number}", {name: tensor.clone() for name, tensor in state.items()})
        return kept

    def _earlier(self, memory: State) -> list[State]:
        numbers = sorted({int(name.partition("/")[0].removeprefix("model")) for name in memory})
        return [prefixed(f"model{number}", memory) for number in numbers]


def rests(shares_kept: Tensor) -> Tensor:
    """Weights [n, m] of earlier models, each step back keeping a share [n, m] of what is left for the newer one.

    Examples
    --------
    >>> rests(torch.tensor([[0.75, 1.0], [0.5, 0.5]]))
    tensor([[0.2500, 0.0000],
            [0.2500, 0.2500]])
    """
    left = (1 - shares_kept).cumprod(1)
    kept = torch.cat([shares_kept[:, 1:], torch.ones_like(shares_kept[:, :1])], 1)
    return left * kept


def _normalised(genomes: Tensor) -> Tensor:
    total = genomes.sum(1, keepdim=True)
    return torch.where(total > 1e-9, genomes / total.clamp_min(1e-9), torch.full_like(genomes, 1 / genomes.shape[1]))
