"""Second-order steps: natural-gradient directions, and the least of a quadratic in the span of a few of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedmerge.state import State
from fedmerge.statistics.measuring.weight_matrices import WeightMatrix

__all__ = ["blocks", "coefficients", "natural_direction"]


def natural_direction(state: State, gradient: State, fisher: State, damping: float) -> dict[str, Tensor]:
    """The damped natural-gradient direction, by parameter.

    Parameters
    ----------
    state
        The model.
    gradient
        Of the loss, by parameter.
    fisher
        As :class:`~fedmerge.statistics.FisherKfac` measures it.
    damping
        In units of the mean of each layer's diagonal.

    Examples
    --------
    >>> w, fisher = torch.zeros(1, 1), {"w.A": torch.tensor([[4.0]]), "w.G": torch.tensor([[1.0]])}
    >>> natural_direction({"w": w}, {"w": torch.tensor([[8.0]])}, fisher, 1e-12)["w"].round(decimals=3)
    tensor([[-2.]], dtype=torch.float64)
    """
    direction: dict[str, Tensor] = {}
    for name, factor in fisher.items():
        parameter, _, part = name.rpartition(".")
        if part == "A":
            matrix = WeightMatrix.measured_by(parameter, factor, state)
            inner, outer = _grouped(factor), _grouped(fisher[f"{parameter}.G"])
            direction |= matrix.scatter(_preconditioned(matrix.gather(gradient).double(), inner, outer, damping))
        elif part == "diag":
            ridge = damping * float(factor.mean())
            if ridge > 0:
                direction[parameter] = -gradient[parameter].double() / (factor.double() + ridge)
    return direction


def _preconditioned(gradient: Tensor, inner: Tensor, outer: Tensor, damping: float) -> Tensor:
    """``-(G + d_G I)^-1 g (A + d_A I)^-1`` of matrices [groups, o, d]."""
    a, g = (factor.diagonal(dim1=-2, dim2=-1).mean() for factor in (inner, outer))
    if float(a) <= 0 or float(g) <= 0:  # a layer that nothing reaches
        return torch.zeros_like(gradient)
    root = damping**0.5
    damped = [f + root * size * torch.eye(f.shape[-1]).to(f) for f, size in ((outer, g), (inner, a))]
    left = torch.linalg.solve(damped[0], gradient)
    right: Tensor = torch.linalg.solve(damped[1], left.transpose(-1, -2))
    return -right.transpose(-1, -2)


def _grouped(factor: Tensor) -> Tensor:
    return factor.double() if factor.ndim == 3 else factor.double()[None]


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
    minima = []
    for trust in trusts:
        c = torch.zeros_like(s)
        if bool(live.any()):
            c[live] = -torch.linalg.solve(f[live][:, live] + trust * torch.diag(scale[live]), s[live])
        minima.append(c)
    return minima
