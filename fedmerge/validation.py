"""Checks on a client's update before anything is done with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fedmerge.errors import BadUpdate
from fedmerge.state import LARGEST, State, is_finite, is_norm_statistic, is_sane
from fedmerge.unmoved import same
from fedmerge.update import ClientUpdate

__all__ = ["check_update", "common_form", "not_finite"]


def common_form(states: Sequence[State]) -> State:
    """The state whose names and shapes most share: what to hold the others against without a base."""
    forms = Counter(_form(state) for state in states)
    usual = forms.most_common(1)[0][0]
    return next(state for state in states if _form(state) == usual)


def _form(state: State) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(sorted((name, tuple(tensor.shape)) for name, tensor in state.items()))


def check_update(
    update: ClientUpdate,
    reference: State,
    *,
    same_shapes: bool = True,
    unread: Collection[str] = (),
    buffers: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
) -> None:
    """Check one update against a state with the right names, shapes and kinds of numbers.

    Parameters
    ----------
    same_shapes
        False for methods that merge models of unequal width.
    unread
        Names of tensors whose values are not looked at here: the method looks at them as it reads them.
    buffers
        Names of buffers: what is infinite or huge in one, unless it is a running statistic, is a mask and says nothing
        of training.
    tied
        By further names of shared tensors, their first.

    Raises
    ------
    BadUpdate
        No examples, a missing or unknown tensor, a wrong shape or kind of number, NaN or infinity.
    """
    client, state = update.client, update.state
    if not (math.isfinite(update.weight) and update.weight > 0):
        raise BadUpdate(
            client,
            f"its weight (number of examples) is {update.weight!r}",
            "Send a positive number of examples.",
        )
    missing = [name for name in reference if name not in state]
    unknown = [name for name in state if name not in reference]
    if missing or unknown:
        listed = [f"tensor {n!r} is missing" for n in missing[:3]] + [
            f"tensor {n!r} is not in the model" for n in unknown[:3]
        ]
        more = len(missing) + len(unknown) - len(listed)
        raise BadUpdate(
            client,
            "; ".join(listed) + (f"; and {more} more" if more else ""),
            "All clients must train the model that the server sent.",
        )
    for alias, name in (tied or {}).items():
        if alias in state and name in state and not same(state[alias], state[name]):
            raise BadUpdate(
                client,
                f"{name!r} and {alias!r}, one tensor in the model, differ",
                "Train them as the one that they are, or cut the tie in the model that the server has.",
            )
    for name, tensor in state.items():
        want = reference[name]
        if same_shapes and tensor.shape != want.shape:
            raise BadUpdate(
                client,
                f"tensor {name!r} has shape {list(tensor.shape)}, the model has {list(want.shape)}",
                "All clients must train the model that the server sent.",
            )
        if _kind(tensor) != _kind(want):
            raise BadUpdate(
                client,
                f"tensor {name!r} is {tensor.dtype}, the model has {want.dtype}",
                "Send tensors as the model has them.",
            )
        if name in buffers and not is_norm_statistic(name):
            _check_buffer(client, name, tensor, want)
        elif name not in unread and not is_sane(tensor):
            raise not_finite(client, name, tensor)


def _check_buffer(client: int, name: str, tensor: Tensor, want: Tensor) -> None:
    """NaN is of training, unless the model has had it before."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.shape != want.shape:
        return
    fresh = tensor.isnan() & ~want.isnan().to(tensor.device)
    if bool(fresh.any()):
        raise not_finite(client, name, torch.where(fresh, tensor, 0))


def not_finite(client: int, name: str, tensor: Tensor) -> BadUpdate:
    """The error for an update with NaN, infinity or a number too large in this tensor."""
    if is_finite(tensor):
        return BadUpdate(
            client,
            f"tensor {name!r} has an entry of {float(tensor.abs().max()):.3g}, which is beyond {LARGEST:g}",
            "Its training diverged: lower the learning rate or clip gradients.",
        )
    bad = int((~torch.isfinite(tensor)).sum())
    return BadUpdate(
        client,
        f"tensor {name!r} has {bad} of {tensor.numel()} entries NaN or infinite",
        "Its training diverged: lower the learning rate or clip gradients.",
    )


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point():
        return "float"
    # torch cannot calculate with the wide unsigned ones, which NumPy has too.
    return str(tensor.dtype) if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else "integer"
