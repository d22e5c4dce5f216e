"""What a strategy tells of its last merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmerge.errors import BadUpdate, ClientFailed

__all__ = ["MergeReport"]


@dataclass(frozen=True)
class MergeReport:
    """Who took part in the last merge: client numbers, and those left out with the reason.

    ``dropped`` are updates that cannot be merged, ``failed`` clients that raised or did not reply, in training or
    whenever they were asked again.
    ``refused`` are clients whose answers about the merged model do not count, with the reason.
    ``skipped`` says why there was no merge and the model stayed as it was, if so; ``answers`` is how many questions a
    client was asked at most, also where what it answered was thrown away or nothing was merged in the end. Over the
    rounds they add up, and :func:`fedmerge.refine.epsilon` says what the sum has cost where clients add noise.
    ``steps_skipped`` are steps of refinements that were not taken, with the reason.
    ``bytes_personal`` is what clients need besides the merged model to make models of their own of it, in all.
    ``metrics`` are the means of what clients told of their training.
    """

    round: int
    accepted: tuple[int, ...]
    dropped: tuple[BadUpdate, ...]
    skipped: str | None = None
    answers: int = 0
    failed: tuple[ClientFailed, ...] = ()
    refused: tuple[tuple[int, str], ...] = ()
    steps_skipped: tuple[tuple[str, str], ...] = ()
    bytes_personal: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
