"""What a merge gives, and what a worker gives of its share of the clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedmerge.checks.magnitudes import Outliers
from fedmerge.checks.tensor_checks import Unmoved
from fedmerge.errors import BadUpdate
from fedmerge.merging.buffers import BufferFold
from fedmerge.personal import PersonalPart, parts_in
from fedmerge.refine.exchanged import Exchanged
from fedmerge.state import prefixed

__all__ = ["MergeResult", "Partial"]


@dataclass(frozen=True)
class MergeResult:
    """What a merge gives: the new state, the memory for next time, and who took part."""

    state: dict[str, Tensor]
    memory: dict[str, Tensor]
    accepted: tuple[int, ...]
    dropped: tuple[BadUpdate, ...]
    exchanges: tuple[Exchanged, ...] = ()
    """What was asked of clients about the merged model, one entry an exchange."""
    answers: int = 0
    """How many questions a client was asked at most, those included that were asked again because another client
    failed, or whose answers were of no use: what :func:`~fedmerge.privacy.accountant.epsilon` counts."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Steps of refinements that were not taken, and why."""
    refused: tuple[tuple[int, str], ...] = ()
    """Clients whose answers to questions of the exchanges do not count, and why."""

    @property
    def personal(self) -> Mapping[int, PersonalPart]:
        """What makes each client's own model of the shared one, for methods that say so (``emr``, ``tall_masks``)."""
        return parts_in(prefixed("aggregator", self.memory))


@dataclass
class Partial:
    """What a worker makes of its share of the clients: a sum of their parameters, their buffers, and who they were."""

    total: Any
    buffers: BufferFold
    accepted: list[int]
    dropped: list[BadUpdate]
    unmoved: Unmoved | None = None
    outliers: Outliers = field(default_factory=Outliers)
