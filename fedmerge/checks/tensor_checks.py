"""One tensor of a client against the model's: its type, and whether a frozen one is as it was."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fedmerge.errors import BadUpdate
from fedmerge.state import State, extent

__all__ = ["Unmoved", "equal_in_all", "in_models_type", "same"]

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


def same(first: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, be it NaN.

    Examples
    --------
    >>> same(torch.tensor([torch.nan]), torch.tensor([torch.nan])), same(torch.ones(2), torch.ones(1))
    (True, False)
    """
    if first.shape != other.shape:
        return False
    other = other.to(first.device)
    return torch.equal(first, other) or bool(((first == other) | (first.isnan() & other.isnan())).all())
