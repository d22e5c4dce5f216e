"""The damped natural gradient of a model, from its gradient and its Fisher information."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge.state import State
from fedmerge.statistics.weight_matrices import WeightMatrix

__all__ = ["natural_direction"]


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
    found: dict[str, Tensor] = {}
    for name, factor in fisher.items():
        parameter, _, part = name.rpartition(".")
        if part == "A":
            matrix = WeightMatrix.measured_by(parameter, factor, state)
            inner, outer = _grouped(factor), _grouped(fisher[f"{parameter}.G"])
            found |= matrix.scatter(_preconditioned(matrix.gather(gradient).double(), inner, outer, damping))
        elif part == "diag":
            ridge = damping * float(factor.mean())
            if ridge > 0:
                found[parameter] = -gradient[parameter].double() / (factor.double() + ridge)
    return found


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
