"""What a server step is: how a merged model becomes the next global one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from fedmerge.errors import InvalidOption
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

    def check_widths(self, merged: State, base: State, method: str) -> None:
        """Make sure that there is a step from one to the other.

        Raises
        ------
        InvalidOption
            A merged parameter has another shape than in the model sent.
        """
        wide = next((name for name, tensor in merged.items() if tensor.shape != base[name].shape), None)
        if wide is not None:
            step = type(self).__name__
            raise InvalidOption(
                f"{step} steps from the model sent to the merged one, and {method} gave {wide!r} the shape "
                f"{list(merged[wide].shape)}, where it was {list(base[wide].shape)}: leave {step} out, or take a "
                "method that keeps widths"
            )
