"""What a refinement is: a stage after the merge in which clients send sums and the server proposes a better model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedmerge.questions import Question
from fedmerge.state import State
from fedmerge.statistics import Statistic

__all__ = ["Proposal", "Refinement", "Step", "Sums"]

Sums = Mapping[str, Mapping[str, Tensor]]
"""Means over all examples of all clients, by statistic and name, float64."""


@dataclass(frozen=True)
class Proposal:
    """Models around the present one, for the clients' held-out examples to choose from.

    Parameters
    ----------
    directions
        What may be added to the present model.
    points
        Factors per direction. The first point, all zeros, is the present model: no stage has to make things worse. A
        single point is taken unjudged: for a stage of several steps, the last of which offers the way back.
    preferred
        The point at which the next step's statistics are measured before it is known which is best: a wrong guess
        costs them once more. None where there is nothing to guess by.
    """

    directions: tuple[State, ...]
    points: tuple[tuple[float, ...], ...]
    preferred: int | None

    def around(self, base: State) -> Question:
        """The question which point is best."""
        return Question(base, self.directions, self.points, self.preferred)


class Step(ABC):
    """One exchange of a refinement."""

    dear: ClassVar[bool] = False
    """Whether what clients measure is so large, or takes so long, that it is not measured on a guess."""

    def wanted(self, losses: Tensor, memory: State) -> bool:
        """Whether to take the step, going by the losses of the last proposal's points (the first is to stay; none where
        the last step proposed nothing) and what the steps before remember."""
        return True

    prepares: ClassVar[bool] = False
    """Whether it only makes a model fit to be judged, so that the choice between several waits for the next step."""

    def least(self, state: State) -> int:
        """Bytes without which the step makes no sense, however its statistics are compressed."""
        return 0

    def most(self, state: State) -> float:
        """Bytes beyond which more are of no use to it."""
        return math.inf

    def question(self, state: State, memory: State) -> Question:
        """What its statistics are about."""
        return Question(state)

    @abstractmethod
    def needs(self) -> tuple[Statistic, ...]:
        """What clients measure at the present model."""

    @abstractmethod
    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """Better models than `state`, or None; and what the next steps of the merge should know.

        Raises
        ------
        InvalidOption
            It does not apply to this model: the stage is skipped with this reason.
        """


class Refinement(ABC):
    """A stage behind an aggregator, ``fedavg+ridge_head``: a frozen dataclass that says which steps are taken."""

    kind: ClassVar[str] = "refinement"
    compares: ClassVar[bool] = False
    """Whether clients need the model that they trained themselves."""
    measures_norms: ClassVar[bool] = False
    """Whether clients measure the statistics of batch norms anew."""

    @abstractmethod
    def steps(self, state: State) -> tuple[Step, ...]:
        """The exchanges, one after the other, for a merged model with these tensors; none where it has no use."""

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """What clients may be asked to measure, whatever the model is."""
        return tuple(kind for step in self.steps({}) for kind in step.needs())
