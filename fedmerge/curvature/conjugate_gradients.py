"""Conjugate gradients on matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Solution", "conjugate_gradients"]

Operator = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """Where the iteration ended: the solution, its steps, and the residual's norm over that of the start.

    ``definite`` is False where a direction of negative curvature was met: then there is no minimum.
    """

    x: Tensor
    steps: int
    residual: float
    definite: bool = True


def conjugate_gradients(
    apply: Operator,
    target: Tensor,
    start: Tensor,
    *,
    precondition: Operator = lambda residual: residual,
    tolerance: float = 1e-8,
    max_steps: int = 1000,
) -> Solution:
    """Solve ``apply(x) = target`` for a symmetric operator without negative eigenvalues.

    Hestenes and Stiefel 1952, preconditioned. Directions in which the operator is zero keep the values of
    `start`, up to what the preconditioner mixes in.

    Parameters
    ----------
    apply, precondition
        Symmetric operators; the second an approximate inverse of the first.
    target, start
        Tensors of one shape.
    tolerance
        End when the residual's norm is this part of the start's.
    max_steps
        End there at the latest.

    Examples
    --------
    >>> import torch
    >>> diagonal = torch.tensor([1.0, 4.0])
    >>> conjugate_gradients(lambda x: diagonal * x, torch.ones(2), torch.zeros(2)).x
    tensor([1.0000, 0.2500])
    """
    x = start.clone()
    residual = target - apply(x)
    first = float(residual.norm())
    if first == 0.0:
        return Solution(x, 0, 0.0)
    z = precondition(residual)
    direction, rz = z.clone(), float((residual * z).sum())
    size, step = first, 0
    while step < max_steps and size > tolerance * first and rz > 0:
        image = apply(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            # Up to rounding a null direction, in which there is nothing to gain.
            definite = curvature >= -1e-9 * float(direction.norm()) * float(image.norm())
            return Solution(x, step, size / first, definite)
        x += (rz / curvature) * direction
        residual -= (rz / curvature) * image
        z = precondition(residual)
        rz, before = float((residual * z).sum()), rz
        direction = z + (rz / before) * direction
        size, step = float(residual.norm()), step + 1
    return Solution(x, step, size / first)
