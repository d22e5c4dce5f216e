"""A second-order step within the span of a few directions, whose curvature clients have measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedmerge.state import State

__all__ = ["blocks", "coefficients"]

_MOST = 8
"""Blocks of a direction: each is one more forward pass for every client."""


def blocks(direction: State, starts: Iterable[str]) -> list[dict[str, Tensor]]:
    """A direction cut into blocks of neighbouring parameters, each of which may then have a length of its own.

    Parameters
    ----------
    direction
        By parameter, in the model's order.
    starts
        Where a block begins: the weights of matrix layers, so that norms go with the layer before them. Neighbours are
        joined where there would be more than eight.

    Examples
    --------
    >>> one = torch.ones(1)
    >>> [list(block) for block in blocks({"a": one, "norm": one, "b": one}, ["a", "b"])]
    [['a', 'norm'], ['b']]
    """
    heads = set(starts)
    cut: list[dict[str, Tensor]] = []
    for name, tensor in direction.items():
        if name in heads or not cut:
            cut.append({name: tensor})
        else:
            cut[-1][name] = tensor
    size = -(-len(cut) // _MOST)
    joined = [cut[i : i + size] for i in range(0, len(cut), size)] if cut else []
    return [{name: tensor for part in group for name, tensor in part.items()} for group in joined]


def coefficients(slope: Tensor, curvature: Tensor, trusts: Sequence[float]) -> list[Tensor]:
    """``-(F + trust diag F)^-1 s`` for each trust: minima of the quadratic along the directions, ever more careful.

    Parameters
    ----------
    slope, curvature
        s [m] and F [m, m], as :class:`~fedmerge.statistics.Secants` measures them.
    trusts
        Levenberg-Marquardt factors, above 0.

    Examples
    --------
    >>> coefficients(torch.tensor([-1.0, 1.0]), torch.eye(2), [1.0])
    [tensor([ 0.5000, -0.5000], dtype=torch.float64)]
    """
    s, f = slope.double(), curvature.double()
    scale = f.diagonal()
    live = scale > 0  # a direction that changes no output has no length
    found = []
    for trust in trusts:
        c = torch.zeros_like(s)
        if bool(live.any()):
            c[live] = -torch.linalg.solve(f[live][:, live] + trust * torch.diag(scale[live]), s[live])
        found.append(c)
    return found
