"""What a server step is: how a merged model becomes the next global one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from fedmerge.state import State

__all__ = ["ServerStep"]


class ServerStep(ABC):
    """A step from the old global model towards a merged one, with memory between rounds.

    Subclasses are frozen dataclasses; any of them may follow any aggregator: ``fednova+server_momentum``.
    """

    kind: ClassVar[str] = "server step"

    @abstractmethod
    def step(self, base: State, merged: State, memory: State) -> tuple[State, State]:
        """The new global parameters and the memory for the next round."""
