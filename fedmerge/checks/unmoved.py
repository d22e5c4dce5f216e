"""Which of the tensors that nobody trains have indeed come back as they were."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fedmerge.state import State

__all__ = ["Unmoved", "equal_in_all", "same"]


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
        found = {name: state[name] for name in self._names if name in state}
        if self._begun:
            self.tensors = {n: t for n, t in self.tensors.items() if n in found and same(t, found[n])}
        else:
            self.tensors, self._begun = found, True

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
