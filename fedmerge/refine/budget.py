"""What refinements cost: the bytes that clients may still send, and the questions that they have been asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fedmerge.errors import InvalidOption
from fedmerge.questions import Answer, Ask, Question
from fedmerge.refine.refinement import Step
from fedmerge.state import State
from fedmerge.statistics.sending.compression import state_bytes

__all__ = ["FIRST_SHARE", "Billed", "Budget", "model_bytes"]

FIRST_SHARE = 0.2
"""Share of the bytes besides the model that goes to the statistics that travel with the model."""
_CHEAP_SHARE = 0.18
"""Share of the remaining bytes that a cheap step gets at most, in each of its exchanges."""
_EXPENSIVE_SHARE = 0.95
"""Share of the remaining bytes that goes to expensive steps; the rest is for the cheap steps between them."""
_LOSS, _POINTS = 8, 24
"""Bytes of one loss, and about how many points a proposal has."""


@dataclass
class Budget:
    """Bytes that each client may still send.

    Parameters
    ----------
    left
        Remaining bytes of the client that has sent most, for all clients are asked for the same. Clients whose answers
        do not count are left aside. None for no limit.
    """

    left: float | None = None
    _spent: dict[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._most = self.left

    def allowed(self, step: Step, state: State, to_come: Sequence[Step], questions: int, points: int) -> float | None:
        """Bytes that the statistics of one step may take, per question; None for no limit.

        The remaining budget, less what the cheap steps will need, is divided evenly among the expensive steps. What a
        step cannot use (:meth:`Step.most`) goes to the others. If this step's share is below its least, later steps are
        dropped from the division, the last one first, until the share suffices.

        Parameters
        ----------
        step
            The step that is about to be taken.
        state
            The model.
        to_come
            The steps after it.
        questions, points
            How many models are asked about in this exchange, and how many points are judged in it.

        Raises
        ------
        InvalidOption
            Fewer bytes are left than the step needs at least.
        """
        if self.left is None:
            return None
        # Losses take bytes too: those of this exchange, and those of the next, which judge what this step proposes.
        left = self.left - _LOSS * (points + _POINTS * questions)
        least = step.least(state) * questions
        if step.expensive:
            total = _EXPENSIVE_SHARE * left
            most = [step.most(state), *(other.most(state) for other in to_come if other.expensive)]
            shares = (_even_share(total, most[:number]) for number in range(len(most), 0, -1))
            share = next((share for share in shares if share >= least), total)
        else:
            share = _CHEAP_SHARE * left
        if left <= least:
            raise InvalidOption(f"the budget leaves {max(0, int(left))} bytes of the {least} that it takes at least")
        return min(max(share, least) / questions, step.most(state))

    def spend(self, answers: Sequence[tuple[int, Sequence[Answer]]], refused: Collection[int] = ()) -> int:
        """Book each client's bytes, and return those of the client that sent most in this exchange.

        The bytes of `refused` clients cost the others nothing, for those clients are asked no more.
        """
        sent = {client: sum(map(_sent, client_answers)) for client, client_answers in answers if client not in refused}
        for client, size in sent.items():
            self._spent[client] = self._spent.get(client, 0) + size
        if self._most is not None:
            self.left = self._most - max((n for c, n in self._spent.items() if c not in refused), default=0)
        return max(sent.values(), default=0)


def _even_share(total: float, most: Sequence[float]) -> float:
    """The first one's part of an even division, where nobody gets more than its `most` and the others get the rest.

    Examples
    --------
    >>> _even_share(12.0, [9.0, 2.0, 9.0]), _even_share(12.0, [3.0, 2.0, 9.0])
    (5.0, 3.0)
    """
    for served, limit in enumerate(sorted(most)):  # whoever wants less than an even share is served first
        share = total / (len(most) - served)
        if limit >= share:
            return min(share, most[0])
        total -= limit
    return most[0]


def model_bytes(state: State) -> int:
    """Bytes of a model's parameters and buffers in float32."""
    return 4 * sum(tensor.numel() for tensor in state.values())


def _sent(answer: Answer) -> int:
    statistics: Mapping[str, State] = answer.statistics
    return sum(map(state_bytes, statistics.values())) + answer.losses.nbytes


@dataclass
class Billed:
    """Clients, and the number of questions that were put to each of those who were asked every time.

    What was asked counts, not what was of use: a client may have answered what the server then threw away because
    another one failed, or what came too late, and whoever listens on the way has it.

    Parameters
    ----------
    ask
        Reaches the clients.
    before
        Called with the number of questions before they are put, say to write it down first.

    Examples
    --------
    >>> ask = Billed(lambda questions, clients: [])
    >>> _ = ask([Question({}), Question({})], [0, 1]), ask([Question({})], [1])
    >>> ask.questions
    3
    """

    ask: Ask
    before: Callable[[int], None] | None = None
    questions: int = 0

    def __call__(self, questions: Sequence[Question], clients: Sequence[int]) -> Sequence[tuple[int, Sequence[Answer]]]:
        """Charge for the questions, then put them."""
        self.questions += len(questions)
        if self.before is not None:
            self.before(len(questions))
        return self.ask(questions, clients)
