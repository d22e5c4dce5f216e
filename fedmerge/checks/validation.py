"""Checks on a client's update before anything is done with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fedmerge.checks.magnitudes import Peaks, check_buffer
from fedmerge.checks.tensor_checks import in_models_type, same
from fedmerge.errors import BadUpdate, shown
from fedmerge.layout import Layout
from fedmerge.state import LARGEST, State, extent, is_finite, is_norm_statistic, is_sane
from fedmerge.update import ClientUpdate

__all__ = [
    "LEAST_WEIGHT",
    "MOST_EXAMPLES",
    "check_held",
    "check_update",
    "checked_update",
    "common_form",
    "not_finite",
    "weight_of",
    "without_still",
]

MOST_EXAMPLES = 2.0**53
"""Largest weight of a client: beyond it a float does not count on, and products with it may overflow."""
LEAST_WEIGHT = 2.0**-64
"""Smallest one: less vanishes beside any number of examples, and alone it leaves nothing but rounding."""


def common_form(states: Sequence[State]) -> State:
    """The state whose names, shapes and types most share: what to hold the others against without a base."""
    forms = [_form(state) for state in states]
    usual = Counter(forms).most_common(1)[0][0]
    alike = [state for state, form in zip(states, forms, strict=True) if form == usual]
    types = [_types(state) for state in alike]
    return alike[types.index(Counter(types).most_common(1)[0][0])]


def _form(state: State) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(sorted((str(name), tuple(getattr(tensor, "shape", ()))) for name, tensor in state.items()))


def _types(state: State) -> tuple[tuple[str, str, bool], ...]:
    """What kinds of numbers a state holds; whether they are sane too, for masks are told from parameters by that."""
    known = ((name, tensor) for name, tensor in sorted(state.items()) if isinstance(tensor, Tensor))
    return tuple((name, str(tensor.dtype), _sane(tensor)) for name, tensor in known)


def _sane(tensor: Tensor) -> bool:
    try:
        return is_sane(tensor)
    except (RuntimeError, NotImplementedError):  # types that torch stores and does not calculate in
        return False


def weight_of(client: int, weight: Any, *, signed: bool = False) -> float:
    """A client's weight as a number; `signed` ones may be below 0.

    Raises
    ------
    BadUpdate
        It is none, or none that many clients' examples can be weighed against.
    """
    try:
        number = float(weight) if isinstance(weight, Real | Tensor) else math.nan
    except (OverflowError, RuntimeError, TypeError, ValueError):
        number = math.nan
    if not LEAST_WEIGHT <= (abs(number) if signed else number) <= MOST_EXAMPLES:
        raise BadUpdate(
            client,
            f"its weight (number of examples) is {shown(weight)}",
            "Send a positive number of examples, up to 2**53.",
        )
    return number


def check_update(update: ClientUpdate, reference: State, **settings: Any) -> ClientUpdate:
    """The update alone of :func:`checked_update`."""
    return checked_update(update, reference, **settings)[0]


def checked_update(
    update: ClientUpdate,
    reference: State,
    *,
    same_shapes: bool = True,
    masks: Collection[str] = (),
    start: State | None = None,
    tied: Mapping[str, str] | None = None,
    signed: bool = False,
) -> tuple[ClientUpdate, Peaks]:
    """Check one update against a state with the right names, shapes and kinds of numbers.

    Its tensors are brought into the model's types before any number in them is looked at.

    Parameters
    ----------
    same_shapes
        False for methods that merge models of unequal width.
    masks
        Names of floating buffers that are no running statistics: what is infinite or huge in one says nothing of
        training.
    start
        The model that the client was sent, where there is one, which is more to hold buffers against.
    tied
        By further names of shared tensors, their first.
    signed
        Whether its weight may be below 0.

    Returns
    -------
    tuple
        The update, its weight a float and its tensors of the model's types; and how large its numbers are.

    Raises
    ------
    BadUpdate
        No examples, a missing or unknown tensor, a wrong shape or kind of number, NaN or infinity.
    """
    client, weight, state = update.client, weight_of(update.client, update.weight, signed=signed), update.state
    if not isinstance(state, Mapping):
        raise BadUpdate(client, f"it is a {type(state).__name__}, not named tensors", "Send a state_dict.")
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
    if same_shapes:
        _check_shapes(client, state, reference)
    state = {name: in_models_type(client, name, tensor, reference[name]) for name, tensor in state.items()}
    for alias, name in (tied or {}).items():
        if alias in state and name in state and not same(state[alias], state[name]):
            raise BadUpdate(
                client,
                f"{name!r} and {alias!r}, one tensor in the model, differ",
                "Train them as the one that they are, or cut the tie in the model that the server has.",
            )
    parameters, statistics = 0.0, 0.0
    for name, tensor in state.items():
        if name in masks:
            _check_mask(client, name, tensor, reference[name])
        else:
            size = extent(tensor)
            if not size <= LARGEST:
                raise not_finite(client, name, tensor)
            if is_norm_statistic(name):
                statistics = max(statistics, size)
            else:
                parameters = max(parameters, size)
        check_buffer(client, name, tensor, masks, None if start is None else start.get(name))
    return replace(update, state=state, weight=weight), Peaks(parameters, statistics)


def without_still(update: ClientUpdate, layout: Layout, still: State) -> ClientUpdate:
    """The update without what does not travel: a ClientApp of one's own may send it all the same.

    Parameters
    ----------
    still
        The tensors that do not travel, as the server has them.

    Raises
    ------
    BadUpdate
        It brings a frozen parameter that is not as it was sent: what was trained beside it goes with another model.
    """
    if not still or not isinstance(update.state, Mapping):
        return update
    for name in layout.frozen:
        sent = update.state.get(name)
        # The client may have it in a shorter type.
        if sent is not None and not (isinstance(sent, Tensor) and same(sent, still[name].to(sent.device, sent.dtype))):
            raise BadUpdate(
                update.client,
                f"frozen parameter {name!r} is not as it was sent",
                "Freeze what the server's model_fn freezes (requires_grad=False), or freeze less there.",
            )
    return replace(update, state=layout.travelling(update.state))


def check_held(update: ClientUpdate, held: State) -> None:
    """Make sure that a checked update has the parameters that the method holds still in this round as they were sent.

    Raises
    ------
    BadUpdate
        It brings one that has moved: what was trained beside it goes with another model.
    """
    for name, tensor in held.items():
        if not same(update.state[name], tensor.to(update.state[name].device)):
            raise BadUpdate(
                update.client,
                f"parameter {name!r} is not as it was sent, and the method holds it still in this round",
                "Train by fedmerge.strategies.client_app, or mark it as not trained in a ClientApp of yours.",
            )


def _check_shapes(client: int, state: State, reference: State) -> None:
    for name, tensor in state.items():
        shape = getattr(tensor, "shape", reference[name].shape)  # what is no tensor is told by its type
        if shape != reference[name].shape:
            raise BadUpdate(
                client,
                f"tensor {name!r} has shape {list(shape)}, the model has {list(reference[name].shape)}",
                "All clients must train the model that the server sent.",
            )


def _check_mask(client: int, name: str, tensor: Tensor, want: Tensor) -> None:
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
