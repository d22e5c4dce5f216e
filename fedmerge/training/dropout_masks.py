"""Dropout of many clients in one call, with the masks that each would draw alone.

One look at the model's forward pass records its calls of dropout. Each client's masks are then drawn from its own
stream, in the order of these calls, and put in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedmerge.errors import CannotStack
from fedmerge.seeding import integer_seed

__all__ = ["DropoutCall", "DropoutStreams", "Recorder", "Replay"]

# Those that multiply by a mask which does not depend on the values.
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)


@dataclass(frozen=True, eq=False)
class DropoutCall:
    """One call of dropout in a forward pass: applied to ones, it is the mask."""

    function: Callable[..., Tensor]
    like: Tensor
    p: float

    def draw(self) -> Tensor:
        """A mask from torch's generator as it stands."""
        return self.function(torch.ones_like(self.like), self.p, True)


class Recorder(TorchFunctionMode):
    """Notes each call of dropout that draws; `calls` holds them in order, None for one that draws nothing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.calls: list[DropoutCall | None] = []
        self._device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _DROPOUTS:
            return func(*args, **kwargs)
        before = _state(self._device)
        out = func(*args, **kwargs)
        if torch.equal(before, _state(self._device)):
            self.calls.append(None)
        else:
            arguments = dict(zip(("input", "p"), args, strict=False)) | kwargs
            # In place, the input now is the output; only its shape, strides and type matter.
            self.calls.append(DropoutCall(func, torch.empty_like(arguments["input"]), arguments.get("p", 0.5)))
        return out


class Replay(TorchFunctionMode):
    """Multiplies by the masks given instead of drawing; the i-th call takes the i-th."""

    def __init__(self, masks: Sequence[Tensor | None]) -> None:
        super().__init__()
        self._masks = iter(masks)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _DROPOUTS:
            return func(*args, **kwargs)
        mask = next(self._masks, None)
        if mask is None:
            return func(*args, **kwargs)
        tensor = args[0] if args else kwargs["input"]
        if tensor.shape != mask.shape:
            raise CannotStack("dropout meets other shapes in this batch than in the one looked at")
        return tensor * mask


class DropoutStreams:
    """The dropout generators of several clients."""

    def __init__(self, clients: Sequence[int], seed: int, round: int, device: torch.device) -> None:
        self._device = device
        self._states = []
        with fork(device):
            for client in clients:
                torch.manual_seed(integer_seed(seed, "dropout", client, round))
                self._states.append(_state(device))

    def draw(self, members: Sequence[int], calls: Sequence[DropoutCall | None]) -> list[Tensor | None]:
        """The masks [k, ...] of some clients for one batch each; advances their streams."""
        if not any(calls):
            return [None] * len(calls)
        drawn: list[list[Tensor | None]] = []
        with fork(self._device):
            for member in members:
                _restore(self._device, self._states[member])
                drawn.append([call.draw() if call else None for call in calls])
                self._states[member] = _state(self._device)
        return [None if masks[0] is None else torch.stack(list(_present(masks))) for masks in zip(*drawn, strict=True)]


def fork(device: torch.device) -> Any:
    """Leave torch's generators as they are when done."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _present(masks: Sequence[Tensor | None]) -> Iterator[Tensor]:
    return (mask for mask in masks if mask is not None)


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore(device: torch.device, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
