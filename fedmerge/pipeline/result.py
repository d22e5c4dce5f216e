"""What a merge gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmerge.errors import BadUpdate
from fedmerge.refine.guard import Exchanged

__all__ = ["MergeResult"]


@dataclass(frozen=True)
class MergeResult:
    """What a merge gives: the new state, the memory for next time, and who took part."""

    state: dict[str, Tensor]
    memory: dict[str, Tensor]
    accepted: tuple[int, ...]
    dropped: tuple[BadUpdate, ...]
    exchanges: tuple[Exchanged, ...] = ()
    """What was asked of clients about the merged model, one entry an exchange."""

    @property
    def answers(self) -> int:
        """How many questions each client answered: what :func:`~fedmerge.refine.privacy.epsilon` counts."""
        return sum(exchange.answers for exchange in self.exchanges)
