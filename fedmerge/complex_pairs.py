"""Complex parameters as pairs of real numbers, which is what everything that merges them calculates with.

So does ``torch.optim``: a square is one of each part, a median that of each part, a norm the same either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge.state import State

__all__ = ["as_pairs", "from_pairs"]


def as_pairs(state: State) -> dict[str, Tensor]:
    """The state with complex tensors [...] as real ones [..., 2]; others as they are.

    Examples
    --------
    >>> as_pairs({"w": torch.tensor([1 + 2j])})["w"]
    tensor([[1., 2.]])
    """
    return {name: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for name, t in state.items()}


def from_pairs(state: State, like: State) -> dict[str, Tensor]:
    """The reverse of :func:`as_pairs`, for those tensors that are complex in `like`.

    Examples
    --------
    >>> from_pairs({"w": torch.tensor([[1.0, 2.0]])}, {"w": torch.tensor([0j])})["w"]
    tensor([1.+2.j])
    """
    return {
        name: torch.view_as_complex(t.contiguous()) if like[name].is_complex() and not t.is_complex() else t
        for name, t in state.items()
    }
