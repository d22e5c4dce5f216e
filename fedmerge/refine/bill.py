"""How many questions clients have been asked: what a privacy budget is charged for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedmerge.questions import Answer, Ask, Question

__all__ = ["Billed"]


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
