"""What is merged stays within what the next round takes: nobody could train on from a model beyond it."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fedmerge.errors import FedMergeError
from fedmerge.state import LARGEST, State, extent

__all__ = ["bounded", "bounded_state", "check_step"]

log = logging.getLogger("fedmerge")


def bounded(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, where all of it fits into the type of `like` and is at most ``LARGEST``; otherwise cut to that.

    NaN stays.

    Examples
    --------
    >>> bounded(torch.tensor([7e4, -1.0]), torch.zeros(2, dtype=torch.float16)).tolist()
    [65504.0, -1.0]
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    limit = min(LARGEST, torch.finfo(like.dtype).max)
    if extent(tensor) <= limit:
        return tensor
    if tensor.is_complex():
        return torch.view_as_complex(torch.view_as_real(tensor.resolve_conj()).clamp(-limit, limit))
    return tensor.clamp(-limit, limit)


def bounded_state(merged: State, method: str, like: State | None = None) -> dict[str, Tensor]:
    """Parameters that `method` has merged, cut to the range of the types in `like`, or of their own; a warning says so.

    Raises
    ------
    FedMergeError
        There is NaN in them.
    """
    found = {name: bounded(tensor, tensor if like is None else like[name]) for name, tensor in merged.items()}
    cut = [name for name, tensor in found.items() if tensor is not merged[name]]
    for name in cut:
        if bool(merged[name].isnan().any()):
            raise FedMergeError(
                f"{method} gave NaN in {name!r} from finite updates: lower its step sizes, "
                "or the clients' learning rate"
            )
    if cut:
        log.warning("%s: %s left the range of the model's numbers and was cut", method, ", ".join(map(repr, cut[:3])))
    return found


_STEPS_LEAP = 1e3
"""How many times as far as its inputs a sensible server step goes at most, momentum over many rounds included."""


def check_step(stepped: State, inputs: tuple[State, State], step: str) -> None:
    """Make sure that a server step, from a model to the merged one, is not what leaves the range of numbers.

    Where the inputs are near the end of the range already it is no fault of the step, and :func:`bounded_state` cuts.

    Raises
    ------
    FedMergeError
        It is: its options are out of all proportion.
    """
    known = max((extent(tensor) for state in inputs for tensor in state.values()), default=0.0)
    for name, tensor in stepped.items():
        if known <= LARGEST / _STEPS_LEAP and not extent(tensor) <= LARGEST:
            raise FedMergeError(f"{step} left the range of numbers in {name!r}: lower its learning rate")
