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


@dataclass
class Budget:
    """Bytes that are left; None for any number."""

    left: float | None = None

    def allowed(self, step: Step, state: State, dear_to_come: int, questions: int) -> float | None:
        """Bytes for the statistics of one step, per question, or None for any number.

        Dear steps, this one and those to come, divide evenly what cheap ones are not likely to need.

        Raises
        ------
        InvalidOption
            Not even the least that the step makes do with is left.
        """
        if self.left is None:
            return None
        share = (1 - _HEAD_SHARE) / max(1, dear_to_come) if step.dear else _HEAD_SHARE
        least = step.least(state) * questions
        if least > self.left:
            raise InvalidOption(f"it takes {least} bytes at least, of which the budget leaves {max(0, int(self.left))}")
        return max(share * self.left, least) / questions

    def spend(self, answers: Sequence[tuple[int, Sequence[Answer]]]) -> None:
        """Note what the client that sent most has sent."""
        if self.left is not None:
            self.left -= max((sum(map(_sent, given)) for _, given in answers), default=0)


def model_bytes(state: State) -> int:
    """Of a model's parameters and buffers in float32."""
    return 4 * sum(tensor.numel() for tensor in state.values())


def _sent(answer: Answer) -> int:
    statistics: Mapping[str, State] = answer.statistics
    return sum(map(state_bytes, statistics.values())) + answer.losses.nbytes
