"""What a refinement is: a stage after the merge in which clients send sums and the server proposes a better model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedmerge.questions import Question
from fedmerge.state import State
from fedmerge.statistics import Statistic
from fedmerge.update import ClientUpdate, MergeContext

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
        """Ask clients which of the points is best."""
        return Question(base, self.directions, self.points, self.preferred)


class Step(ABC):
    """One exchange of a refinement."""

    expensive: ClassVar[bool] = False
    """Whether its statistics take many bytes or much time.

    Statistics of a cheap step are measured at the point that is likely to win, before clients have judged. Where the
    guess is wrong they are measured again. An expensive step waits for the judgement."""

    prepares: ClassVar[bool] = False
    """Whether its model only becomes comparable after the next step: then no choice between models is made yet."""

    def wanted(self, losses: Tensor, memory: State) -> bool:
        """Whether to take the step at all.

        Parameters
        ----------
        losses
            Of the points of the last proposal, [points]. The first point is the model as it was; empty where the last
            step proposed nothing.
        memory
            What the steps before left.
        """
        return True

    def least(self, state: State) -> int:
        """Fewest bytes with which the step makes sense, its statistics compressed as far as they can be."""
        return 0

    def most(self, state: State) -> float:
        """Bytes that it can make use of: more would not improve the step."""
        return math.inf

    def question(self, state: State, memory: State) -> Question:
        """The model at which its statistics are measured, and the directions along which they are."""
        return Question(state)

    @abstractmethod
    def needs(self) -> tuple[Statistic, ...]:
        """Statistics that clients measure for it."""

    @abstractmethod
    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """Propose models that may be better than `state`, or None, and hand on a memory to the next steps.

        Raises
        ------
        InvalidOption
            It does not apply to this model: the stage is skipped with this reason.
        """


class Refinement(ABC):
    """A stage after an aggregator, as in ``fedavg+ridge_head``: a frozen dataclass that lists its steps."""

    kind: ClassVar[str] = "refinement"
    compares: ClassVar[bool] = False
    """Whether clients need the model that they trained themselves."""
    measures_norms: ClassVar[bool] = False
    """Whether clients measure the statistics of batch norms anew."""
    fits_head: ClassVar[bool] = False
    """Whether all that it changes is the output layer."""

    combines: ClassVar[bool] = False
    """Whether it needs the models that were merged, see :meth:`knowing`: then the server keeps them all."""

    def asks(self, context: MergeContext) -> bool:
        """Whether clients have to be reached for its steps.

        Raises
        ------
        InvalidOption
            It can be carried out neither by them nor by the server.
        """
        return True

    def knowing(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> Refinement:
        """This refinement with what was merged, and what the aggregator remembered before."""
        return self

    @abstractmethod
    def steps(self, state: State) -> tuple[Step, ...]:
        """The steps, in order, for a merged model with these tensors; none where the stage cannot improve it."""

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """All statistics that clients may be asked for, for any model."""
        return tuple(kind for step in self.steps({}) for kind in step.needs())
