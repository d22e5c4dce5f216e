"""What a strategy tells of its last merge."""

from __future__ import annotations

from dataclasses import dataclass

from fedmerge.errors import BadUpdate, ClientFailed

__all__ = ["MergeReport"]


@dataclass(frozen=True)
class MergeReport:
    """Who took part in the last merge: client numbers, and those left out with the reason.

    ``dropped`` are updates that cannot be merged, ``failed`` clients that raised or did not reply, in training or
    whenever they were asked again.
    ``skipped`` says why there was no merge and the model stayed as it was, if so; ``answers`` is how many questions
    each client answered, which is what :func:`fedmerge.refine.epsilon` counts where they add noise.
    """

    round: int
    accepted: tuple[int, ...]
    dropped: tuple[BadUpdate, ...]
    skipped: str | None = None
    answers: int = 0
    failed: tuple[ClientFailed, ...] = ()
