"""What became of a refinement: the model, the exchanges that led to it, and the steps that were not taken."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor

from fedmerge.state import State

__all__ = ["Exchanged", "Refined"]

log = logging.getLogger("fedmerge")


@dataclass(frozen=True)
class Exchanged:
    """What one exchange was about, and where it led.

    Parameters
    ----------
    judged
        Name of the step whose proposal was judged; empty where none was.
    loss
        Mean held-out loss of the model that was chosen; NaN where nothing was judged.
    point
        Factors of the point that was chosen, all zeros where the proposal was declined.
    measured
        Statistics that clients sent for the next step.
    state
        The model as it stood after the exchange.
    answers
        How many questions it put; those asked again count in ``MergeResult.answers``.
    bytes_up
        Tensors that the client that sent most sent in it, of those whose answers count.
    refused
        Clients whose answers do not count, and why; they are asked no more in the same merge.
    """

    judged: str
    loss: float
    point: tuple[float, ...]
    measured: tuple[str, ...]
    state: State = field(repr=False)
    answers: int = 1
    bytes_up: int = 0
    refused: tuple[tuple[int, str], ...] = ()


@dataclass
class Refined:
    """The model after all stages, and the exchanges that led to it."""

    state: dict[str, Tensor]
    exchanges: list[Exchanged] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Steps that were not taken, and why."""

    def skip(self, step: str, reason: object) -> None:
        """Note that a step is not taken."""
        log.warning("%s is skipped: %s", step, reason)
        self.skipped.append((step, str(reason)))
