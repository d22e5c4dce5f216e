"""How many bytes clients may still send, and how they are divided among what a merge goes on to ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmerge.errors import InvalidOption
from fedmerge.questions import Answer
from fedmerge.refine.base import Step
from fedmerge.state import State
from fedmerge.statistics.compression import state_bytes

__all__ = ["FIRST_SHARE", "Budget", "model_bytes"]

FIRST_SHARE = 0.25
"""Of what a client may send besides its model goes to the statistics that travel with the model."""
_HEAD_SHARE = 0.1
"""Of what is left goes at most to one cheap step, in each of its exchanges."""
_LOSS, _POINTS = 8, 24
"""Bytes of a judgement of one point, and about how many points a proposal has."""
_GOOD = 2.0
"""Times the least that a dear step makes do with: enough to tell something of what it measures."""


@dataclass
class Budget:
    """Bytes that are left; None for any number."""

    left: float | None = None

    def allowed(self, step: Step, state: State, dear_to_come: int, questions: int, points: int) -> float | None:
        """Bytes for the statistics of one step, per question, or None for any number.

        Dear steps, this one and those to come, divide evenly what cheap ones are not likely to need, but one good step
        is better than several bad ones.

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
        share = (1 - _HEAD_SHARE) / max(1, dear_to_come) if step.dear else _HEAD_SHARE
        if step.dear and share * left < _GOOD * least:
            share = 1 - _HEAD_SHARE
        if left <= least:
            raise InvalidOption(f"the budget leaves {max(0, int(left))} bytes of the {least} that it takes at least")
        return max(share * left, least) / questions

    def spend(self, answers: Sequence[tuple[int, Sequence[Answer]]]) -> int:
        """Note the bytes of the client that sent most, and tell them."""
        most = max((sum(map(_sent, given)) for _, given in answers), default=0)
        if self.left is not None:
            self.left -= most
        return most


def model_bytes(state: State) -> int:
    """Of a model's parameters and buffers in float32."""
    return 4 * sum(tensor.numel() for tensor in state.values())


def _sent(answer: Answer) -> int:
    statistics: Mapping[str, State] = answer.statistics
    return sum(map(state_bytes, statistics.values())) + answer.losses.nbytes
