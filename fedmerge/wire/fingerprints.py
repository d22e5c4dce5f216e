"""Fingerprints of tensors that both sides are to have: whether they are the same ones, told in a few bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

from fedmerge.state import State

__all__ = ["differing", "fingerprint", "names_mark"]

_TOLERANCE = 1e-3  # of a tensor's norm: types of 16 bits, and processors that draw a seed's numbers a last bit apart
_CHUNK = 1 << 20
_TURN = 2.399963229728653  # the golden angle: no two entries of a tensor weigh alike


def fingerprint(state: State, names: Sequence[str]) -> list[float]:
    """Two numbers a tensor: its norm, and a sum of its entries that weighs each by the cosine of its place.

    Examples
    --------
    >>> same = fingerprint({"w": torch.ones(3)}, ["w"])
    >>> differing(["w"], same, fingerprint({"w": torch.ones(3)}, ["w"]))
    >>> differing(["w"], same, fingerprint({"w": torch.tensor([1.0, 1.0, -1.0])}, ["w"]))
    'w'
    """
    return [number for name in names for number in _of(state[name])]


def differing(names: Sequence[str], first: Sequence[float], other: Sequence[float]) -> str | None:
    """The first of the tensors whose fingerprints are not those of the same numbers."""
    for place, name in enumerate(names):
        mine, theirs = first[2 * place : 2 * place + 2], other[2 * place : 2 * place + 2]
        allowed = _TOLERANCE * max(1e-12, abs(mine[0]))
        if len(theirs) < 2 or any(not abs(a - b) <= allowed for a, b in zip(mine, theirs, strict=True)):
            return name
    return None


def names_mark(names: Sequence[str]) -> int:
    """A number that tells lists of names apart."""
    return crc32("\n".join(names).encode())


@torch.no_grad()
def _of(tensor: Tensor) -> tuple[float, float]:
    squares = total = 0.0
    flat = (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).detach().cpu().flatten()
    for start in range(0, len(flat), _CHUNK):
        piece = flat[start : start + _CHUNK].double().nan_to_num(nan=2.0, posinf=1.0, neginf=-1.0)  # masks hold -inf
        weights = torch.arange(start + 1, start + 1 + len(piece), dtype=torch.float64).mul_(_TURN).cos_()
        squares += float(piece.square().sum())
        total += float(piece @ weights)
    return math.sqrt(squares), total
