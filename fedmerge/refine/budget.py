"""How many bytes clients may still send, and how they are divided among what a merge goes on to ask."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fedmerge.errors import InvalidOption
from fedmerge.questions import Answer
from fedmerge.refine.base import Step
from fedmerge.state import State
from fedmerge.statistics.compression import state_bytes

__all__ = ["FIRST_SHARE", "Budget", "model_bytes"]

FIRST_SHARE = 0.2
"""Of what a client may send besides its model goes to the statistics that travel with the model."""
_HEAD_SHARE = 0.18
"""Of what is left goes at most to one cheap step, in each of its exchanges."""
_DEAR_SHARE = 0.95
"""Of what is left goes to dear steps: directions' slopes and curvatures come after them."""
_LOSS, _POINTS = 8, 24
"""Bytes of a judgement of one point, and about how many points a proposal has."""


@dataclass
class Budget:
    """Bytes that each client has left; None for any number.

    Parameters
    ----------
    left
        Of the client that has sent most of those whose answers count: all of them are asked for as much.
    """

    left: float | None = None
    _spent: dict[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._most = self.left

    def allowed(self, step: Step, state: State, to_come: Sequence[Step], questions: int, points: int) -> float | None:
        """Bytes for the statistics of one step, per question, or None for any number.

        Dear steps, this one and those to come, divide evenly what cheap ones are not likely to need and what those that
        know when they have enough leave; where that is too little for this one, the last of those to come go without.

        Raises
        ------
        InvalidOption
            Not even the least that the step makes do with is left.
        """
        if self.left is None:
            return None
        # Judgements of what is proposed have to be paid as well: those of this exchange, and of the next.
        left = self.left - _LOSS * (points + _POINTS * questions)
        least = step.least(state) * questions
        if step.dear:
            enough = [step.most(state), *(other.most(state) for other in to_come if other.dear)]
            shares = (_even(left * _DEAR_SHARE, enough[:number]) for number in range(len(enough), 0, -1))
            share = next((share for share in shares if share >= least), left * _DEAR_SHARE)
        else:
            share = _HEAD_SHARE * left
        if left <= least:
            raise InvalidOption(f"the budget leaves {max(0, int(left))} bytes of the {least} that it takes at least")
        return min(max(share, least) / questions, step.most(state))

    def spend(self, answers: Sequence[tuple[int, Sequence[Answer]]], refused: Collection[int] = ()) -> int:
        """Note each client's bytes, and tell those of the client that sent most.

        What a client sent that is `refused` takes nothing from the others: it is asked no more.
        """
        sent = {client: sum(map(_sent, given)) for client, given in answers if client not in refused}
        for client, size in sent.items():
            self._spent[client] = self._spent.get(client, 0) + size
        if self._most is not None:
            self.left = self._most - max((n for c, n in self._spent.items() if c not in refused), default=0)
        return max(sent.values(), default=0)


def _even(total: float, most: Sequence[float]) -> float:
    """What the first gets where all share evenly, and what is more than enough for one goes to the others."""
    for rank, enough in enumerate(sorted(most)):
        share = total / (len(most) - rank)
        if enough >= share:
            return min(share, most[0])
        total -= enough
    return most[0]


def model_bytes(state: State) -> int:
    """Of a model's parameters and buffers in float32."""
    return 4 * sum(tensor.numel() for tensor in state.values())


def _sent(answer: Answer) -> int:
    statistics: Mapping[str, State] = answer.statistics
    return sum(map(state_bytes, statistics.values())) + answer.losses.nbytes
