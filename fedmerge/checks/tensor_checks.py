"""One tensor of a client against the model's: its type, what a buffer may hold, whether a frozen one is as it was."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fedmerge.errors import BadUpdate
from fedmerge.state import LARGEST, State, as_rows, extent, is_norm_statistic

__all__ = ["Unmoved", "check_buffer", "equal_in_all", "fine_rows", "in_models_type", "same"]

_AS_SENT = "Send tensors as the model has them."


def in_models_type(client: int, name: str, tensor: Any, want: Tensor) -> Tensor:
    """A tensor of a client in the type of the model's.

    Nothing is calculated in a type that a client has chosen: doubles in one place of a sum in float32 would overflow
    there, or change what all the others get.

    Raises
    ------
    BadUpdate
        It is no plain tensor, holds another kind of numbers, or numbers that the model's type cannot hold.

    Examples
    --------
    >>> in_models_type(0, "w", torch.tensor([0.5], dtype=torch.float64), torch.zeros(1)).dtype
    torch.float32
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise BadUpdate(client, f"tensor {name!r} is {_called(tensor)}, not a plain tensor", _AS_SENT)
    sent: Tensor = tensor.detach() if tensor.requires_grad else tensor
    if sent.dtype == want.dtype:
        return sent
    if _kind(sent) != _kind(want):
        raise BadUpdate(client, f"tensor {name!r} is {sent.dtype}, the model has {want.dtype}", _AS_SENT)
    cast = sent.to(want.dtype)
    if _kind(want) == "integer":
        lost = not torch.equal(cast.to(sent.dtype), sent)
    else:
        lost = extent(cast) == float("inf") and not bool(_as_float(sent).isinf().any())
    if lost:
        raise BadUpdate(
            client,
            f"tensor {name!r} has an entry of {_largest(sent):.3g}, which the model's {want.dtype} cannot hold",
            "Send tensors as the model has them; if its training diverged, lower the learning rate.",
        )
    return cast


def _as_float(tensor: Tensor) -> Tensor:
    """Types of eight bits know few operations."""
    return tensor if tensor.is_complex() or tensor.element_size() > 1 else tensor.float()


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if not tensor.is_complex() else extent(tensor)


def _called(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return "quantized" if value.is_quantized else "without data" if value.is_meta else str(value.layout)


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point():
        return "float"
    # torch cannot calculate with the wide unsigned ones, which NumPy has too.
    return str(tensor.dtype) if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else "integer"


MOST_GROWTH = 10_000_000
"""How far whole numbers in a buffer may leave the range of the model sent: more steps than any client takes a round."""


def check_buffer(client: int, name: str, tensor: Tensor, masks: Collection[str], start: Tensor | None) -> None:
    """Check one tensor, in the model's type, that may be a buffer, against that of the model sent, where there is one.

    Raises
    ------
    BadUpdate
        A negative variance or count, whole numbers far from the model's, NaN, or what is infinite or huge in a mask
        and is not so in the model's.
    """
    number = tensor.is_floating_point() or tensor.is_complex()
    if (number and name not in masks and not is_norm_statistic(name)) or bool(
        fine_rows(name, tensor[None], masks, start).all()
    ):
        return
    if number:
        what = "a negative variance" if is_norm_statistic(name) else f"entries beyond {LARGEST:g}"
        raise BadUpdate(client, f"buffer {name!r} has {what}, unlike the model sent", "Do not change what masks.")
    raise BadUpdate(
        client,
        f"buffer {name!r} counts to {_farthest(tensor)}, which no training does from {_told(start)}",
        "Start from the model that the server sent.",
    )


def fine_rows(name: str, stacked: Tensor, masks: Collection[str], start: Tensor | None) -> Tensor:
    """For tensors of K clients [K, ...] that may be buffers, which of them may be merged [K].

    How large parameters and running statistics are is not looked at here.

    Examples
    --------
    >>> fine_rows("norm.running_var", torch.tensor([[0.5], [-1.0]]), (), None).tolist()
    [True, False]
    """
    rows = as_rows(stacked)
    fine = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if not rows.shape[1] or rows.dtype == torch.bool:
        return fine
    if rows.is_floating_point() or rows.is_complex():
        if name.endswith("running_var") and not rows.is_complex():
            return rows.amin(1) >= 0
        known = name in masks and start is not None and start.shape == stacked.shape[1:]
        return _as_masked(rows, as_rows(start[None]).to(rows.device)) if known else fine  # type: ignore[index]
    low, high = rows.amin(1), rows.amax(1)
    if name.endswith("num_batches_tracked"):
        fine = low >= 0
    if start is None or not start.numel():
        return fine
    least, most = min(int(start.min()), 0) - MOST_GROWTH, max(int(start.max()), 0) + MOST_GROWTH
    limits = torch.iinfo(rows.dtype)
    return fine & (low >= max(least, limits.min)) & (high <= min(most, limits.max))


def _as_masked(rows: Tensor, own: Tensor) -> Tensor:
    """Whether all that is huge or infinite in a mask is so in the model's, NaN aside."""
    return ((rows == own) | rows.isnan() | (rows.abs() <= LARGEST)).all(1)


def _farthest(tensor: Tensor) -> int:
    low, high = int(tensor.min()), int(tensor.max())
    return low if -low > high else high


def _told(start: Tensor | None) -> str:
    return "the model sent" if start is None or not start.numel() else f"{_farthest(start)} in the model sent"


class Unmoved:
    """Follows frozen tensors over a stream of clients, and holds those that are equal in all of them.

    Examples
    --------
    >>> unmoved = Unmoved({"a", "b"})
    >>> unmoved.add({"a": torch.zeros(1), "b": torch.zeros(1)})
    >>> unmoved.add({"a": torch.zeros(1), "b": torch.ones(1)})
    >>> unmoved.tensors
    {'a': tensor([0.])}
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names, self._begun = frozenset(names), False
        self.tensors: dict[str, Tensor] = {}

    def add(self, state: State) -> None:
        """One client."""
        theirs = {name: state[name] for name in self._names if name in state}
        if self._begun:
            self.tensors = {n: t for n, t in self.tensors.items() if n in theirs and same(t, theirs[n])}
        else:
            self.tensors, self._begun = theirs, True

    def add_stacked(self, states: State) -> None:
        """Many clients, tensors [K, ...] with K above 0."""
        alike = {n: states[n][0] for n in self._names if n in states and bool((states[n] == states[n][:1]).all())}
        self.add(alike)

    def join(self, other: Unmoved) -> Unmoved:
        """The clients of both."""
        if other._begun:
            self.add(other.tensors)
        return self


def equal_in_all(states: Collection[State], names: Collection[str]) -> frozenset[str]:
    """Those of `names` whose tensors are the same in all states."""
    unmoved = Unmoved(names)
    for state in states:
        unmoved.add(state)
    return frozenset(unmoved.tensors)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, be it NaN.

    Examples
    --------
    >>> same(torch.tensor([torch.nan]), torch.tensor([torch.nan])), same(torch.ones(2), torch.ones(1))
    (True, False)
    """
    if one.shape != other.shape:
        return False
    other = other.to(one.device)
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
