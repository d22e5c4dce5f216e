"""What methods have in common that search for coefficients of the clients' models."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.searching.search import Problem, Search, Span, by_tensor, task_vectors
from fedmerge.state import State
from fedmerge.statistics import Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["JUDGES", "Judge", "Searched", "shares", "vectors_by"]

Judge = Literal["auto", "server", "clients"]
JUDGES = ("auto", "server", "clients")


@dataclass(frozen=True)
class Searched(Aggregator):
    """A model within the span of the clients', whose coefficients a search finds.

    Subclasses say which directions there are (:meth:`span`) and how coefficients are sought (:meth:`search`). The
    merge is the model at the search's start; the search follows as a stage of its own once buffers are merged. Models
    are judged on the server's data, or by the clients' summed losses, in exchanges that bring each of them the merged
    model and all directions: as many bytes downwards as the server has client models, and a few numbers back. The best
    model that was judged is taken, the start among them.

    Parameters
    ----------
    evaluations
        How many models are judged besides the start, or how many gradients are taken; 0 for no search.
    judge
        ``"server"``: on the server's data; ``"clients"``: by their examples; ``"auto"``: on the server where it has
        data that tell what is wanted, else by clients.
    """

    evaluations: int = field(default=40, kw_only=True)
    judge: Judge = field(default="auto", kw_only=True)

    unlabelled: ClassVar[bool] = False
    """Whether inputs without targets can judge."""

    def __post_init__(self) -> None:
        check_range(self, "evaluations", 0, float("inf"), open_high=True)
        if self.judge not in JUDGES:
            raise InvalidOption(f"{type(self).__name__}: judge must be of {list(JUDGES)}, got {self.judge!r}")

    @property
    def measured_in_search(self) -> tuple[Statistic, ...]:
        """What clients may be asked to measure in the search, besides losses."""
        return ()

    @abstractmethod
    def span(self, updates: Sequence[ClientUpdate], context: MergeContext, memory: State) -> Span:
        """The models among which is searched; without updates, none."""

    @abstractmethod
    def search(self, problem: Problem) -> Search:
        """Seek coefficients, from the start on."""

    def remember(self, updates: Sequence[ClientUpdate], context: MergeContext, memory: State) -> State:
        """What the next round's :meth:`span` has to know."""
        return {}

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """The model at the search's start."""
        read = tuple(updates)
        span = self.span(read, context, memory)
        return span.state(span.start), self.remember(read, context, memory)


def shares(updates: Sequence[ClientUpdate]) -> Tensor:
    """``p_i = n_i / sum n``, [K], float64."""
    weights = torch.tensor([update.weight for update in updates], dtype=torch.float64)
    return weights / weights.max() / (weights / weights.max()).sum()


def vectors_by(
    updates: Sequence[ClientUpdate], base: State, start: Tensor, granularity: Literal["model", "tensor"]
) -> tuple[tuple[State, ...], Tensor]:
    """Task vectors as directions, one per model or one per model and tensor, and their start coefficients."""
    vectors = task_vectors([update.state for update in updates], base)
    return (vectors, start) if granularity == "model" else by_tensor(vectors, start)
