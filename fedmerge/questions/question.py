"""What is asked about a merged model, and what clients answer: losses around it, and statistics at it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedmerge.state import State, cast_like
from fedmerge.statistics import ComparingStatistic, Statistic
from fedmerge.statistics.sending.compression import Compression
from fedmerge.statistics.sending.noise import NoisySums

__all__ = ["Answer", "Ask", "Question", "bringing"]


@dataclass(frozen=True)
class Question:
    """What clients are asked about a model.

    Parameters
    ----------
    base
        All tensors of a model.
    directions
        Tensors to add to it, each perhaps to some of the names: of these points are made, and along them statistics.
    points
        Models to be judged: for each, a factor per direction; none where nothing is.
    at
        At which of the points statistics are measured; None for the base.
    needs
        What to measure.
    holdout
        Every so many-th example judges points and is not measured, so that no step is judged by what it was made of.
    compression, budget
        How statistics are sent, see :class:`~fedmerge.statistics.StatisticsSettings`.
    noise
        What clients do to protect single examples; `needs` must be clipped to match, see
        :meth:`~fedmerge.statistics.NoisySums.applied`.
    own
        By client, the model that it trained, its neurons in the order of `base`: of clients whose neurons the server
        has moved, where statistics compare. Each needs only its own.
    """

    base: State
    directions: tuple[State, ...] = ()
    points: tuple[tuple[float, ...], ...] = ()
    at: int | None = None
    needs: tuple[Statistic, ...] = ()
    holdout: int = 10
    compression: Compression = "none"
    budget: float = 1.0
    noise: NoisySums | None = None
    own: Mapping[int, State] = field(default_factory=dict)

    @property
    def compares(self) -> bool:
        """Whether clients need the model that they trained themselves to answer."""
        return any(isinstance(kind, ComparingStatistic) for kind in self.needs)

    def point(self, number: int | None) -> dict[str, Tensor]:
        """The tensors of one of the points, or of the base."""
        found = dict(self.base)
        if number is None:
            return found
        for factor, direction in zip(self.points[number], self.directions, strict=True):
            for name, step in direction.items():
                if factor:
                    found[name] = found[name].double() + factor * step.double()
        return cast_like(found, self.base)


@dataclass(frozen=True)
class Answer:
    """What one client, or all of them together, found.

    Parameters
    ----------
    losses
        [points], the task's loss summed over the examples that judge, float64.
    judged, examples
        How many examples judged, and how many were measured.
    statistics
        Means over the measured examples, by statistic.
    clients
        How many clients' sums these are.
    noise
        The noise that was added: whoever drops the question's wish for it on the way to a client is found out.
    """

    losses: Tensor
    judged: int
    examples: int
    statistics: Mapping[str, State] = field(default_factory=dict)
    clients: int = 1
    noise: NoisySums | None = None

    @property
    def loss(self) -> Tensor:
        """[points], mean loss."""
        return self.losses / max(1, self.judged)


Ask = Callable[[Sequence[Question], Sequence[int]], Sequence[tuple[int, Sequence[Answer]]]]
"""Puts questions to these clients, in one exchange; each one's answers come with its number, in order of numbers."""


def bringing(ask: Ask, own: Mapping[int, State]) -> Ask:
    """`ask` with questions that compare bringing each client its own model as it was aligned."""

    def brought(questions: Sequence[Question], clients: Sequence[int]) -> Sequence[tuple[int, Sequence[Answer]]]:
        return ask([replace(question, own=own) if question.compares else question for question in questions], clients)

    return brought
