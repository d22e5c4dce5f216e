"""Sums of Kronecker products: the curvature of one layer over all clients, and where its quadratic is least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedmerge.curvature.collected import Collected
from fedmerge.statistics.measuring.weight_matrices import WeightMatrix

__all__ = ["KroneckerSum", "LayerSystem", "Solution", "conjugate_gradients"]

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


_COARSE = 1e-4  # how far one pass in float32 goes


@dataclass(frozen=True)
class KroneckerSum:
    """The operator ``X -> sum_i G_i X A_i + ridge X`` on matrices X [groups, o, d].

    Parameters
    ----------
    inputs
        A_i, [K, groups, d, d], float64.
    outputs
        G_i, [K, groups, o, o], with the clients' weights in them.
    ridge
        At least 0.
    """

    inputs: Tensor
    outputs: Tensor
    ridge: float = 0.0

    @classmethod
    def of(cls, inputs: Sequence[Tensor], outputs: Sequence[Tensor], weights: Sequence[float]) -> KroneckerSum:
        """Stack factors [d, d] or [groups, d, d] of the clients."""
        weighted = [w * _grouped(g) for g, w in zip(outputs, weights, strict=True)]
        return cls(torch.stack([_grouped(a) for a in inputs]), torch.stack(weighted))

    def terms(self, matrices: Tensor) -> Tensor:
        """``sum_i G_i X_i A_i``, X_i [K, groups, o, d] or one X for all; no ridge."""
        return (self.outputs @ matrices @ self.inputs).sum(0)

    def __call__(self, matrix: Tensor) -> Tensor:
        """Apply to one matrix."""
        return self.terms(matrix) + self.ridge * matrix

    @property
    def mean_diagonal(self) -> float:
        """Mean of the operator's diagonal, ridge aside: the natural unit of a ridge."""
        traces = self.inputs.diagonal(dim1=-2, dim2=-1).mean(-1) * self.outputs.diagonal(dim1=-2, dim2=-1).mean(-1)
        return float(traces.sum(0).mean())

    def solve(self, target: Tensor, start: Tensor, *, tolerance: float, max_steps: int) -> Solution:
        """Solve ``self(X) = target`` by preconditioned conjugate gradients from `start`.

        In the eigenbasis of the mean factors the preconditioner, the inverse of their Kronecker product plus
        the ridge, is a division. Steps are taken in float32, at half the cost, and the residual that remains
        is computed in float64 and solved for again, until it is small enough.
        """
        size = self.mean_diagonal
        if size == 0.0:
            return Solution(start.clone(), 0, 0.0)
        a_vectors, g_vectors = (torch.linalg.eigh(f).eigenvectors for f in (self.inputs.mean(0), self.outputs.sum(0)))
        rotated = KroneckerSum(
            _conjugated(self.inputs, a_vectors), _conjugated(self.outputs, g_vectors) / size, self.ridge / size
        )
        x = torch.zeros_like(start)
        first = residual = g_vectors.transpose(-1, -2) @ (target - self(start)) @ a_vectors / size
        if not bool(first.any()):  # the start solves it, as where all clients are equal
            return Solution(start.clone(), 0, 0.0)
        coarse, divisor = rotated.to(torch.float32), rotated._approximate_diagonal().float()
        steps, reached, definite = 0, 1.0, bool(first.norm() > 0)
        while definite and steps < max_steps and reached > tolerance:
            norm = residual.norm()
            coarse_solution = conjugate_gradients(
                coarse,
                (residual / norm).float(),
                torch.zeros_like(residual, dtype=torch.float32),
                precondition=lambda r: r / divisor,
                tolerance=max(_COARSE, 0.5 * tolerance / reached),
                max_steps=max_steps - steps,
            )
            x = x + norm * coarse_solution.x.double()
            residual = first - rotated(x)
            before, reached = reached, float(residual.norm() / first.norm())
            steps, definite = steps + max(coarse_solution.steps, 1), coarse_solution.definite
            if reached > 0.5 * before:  # float32 resolves no more, or the steps are used up
                break
        return Solution(start + g_vectors @ x @ a_vectors.transpose(-1, -2), steps, reached, definite)

    def to(self, dtype: torch.dtype) -> KroneckerSum:
        """The operator in another precision."""
        return KroneckerSum(self.inputs.to(dtype), self.outputs.to(dtype), self.ridge)

    def _approximate_diagonal(self) -> Tensor:
        """Of the Kronecker product of mean factors, in the operator's units, plus the ridge, [groups, o, d]."""
        a, g = (f.diagonal(dim1=-2, dim2=-1).clamp_min(0) for f in (self.inputs.mean(0), self.outputs.sum(0)))
        products = g[..., :, None] * a[..., None, :]
        products = products * (self.mean_diagonal / max(float(products.mean()), 1e-300))
        # Where curvature vanishes the preconditioner must not blow rounding errors up.
        return products + self.ridge + 1e-9 * products.max()


def _conjugated(factors: Tensor, vectors: Tensor) -> Tensor:
    return vectors.transpose(-1, -2) @ factors @ vectors


def _grouped(factor: Tensor) -> Tensor:
    factor = factor.double()
    return factor if factor.ndim == 3 else factor[None]


@dataclass(frozen=True)
class LayerSystem:
    """``min_W sum_i w_i tr (W - W_i)^T G_i (W - W_i) A_i + ridge ||W - M||^2`` with the clients' mean M.

    Solved for the way from M: its norm sets the scale that rounding is relative to.
    """

    matrix: WeightMatrix
    start: Tensor
    moves: Tensor
    curvature: KroneckerSum

    @classmethod
    def of(
        cls,
        clients: Collected,
        weight: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        weights: Sequence[float],
        damping: float,
    ) -> LayerSystem:
        """The system of `weight`; the ridge is `damping` in units of the mean of the curvature's diagonal."""
        matrix = WeightMatrix.measured_by(weight, inputs[0], clients.mean)
        start = matrix.gather(clients.mean).double()
        moves = torch.stack([matrix.gather(state).double() - start for state in clients.states])
        curvature = KroneckerSum.of(inputs, outputs, weights)
        return cls(matrix, start, moves, replace(curvature, ridge=damping * curvature.mean_diagonal))

    def solved(self, *, tolerance: float, max_steps: int) -> tuple[dict[str, Tensor], float, bool]:
        """Parameters at the minimum, the residual that is left, and whether the curvature has a minimum at all."""
        solution = self.curvature.solve(
            self.curvature.terms(self.moves), torch.zeros_like(self.start), tolerance=tolerance, max_steps=max_steps
        )
        return self.matrix.scatter(self.start + solution.x), solution.residual, solution.definite

    def stepped(self, steps: int) -> dict[str, Tensor]:
        """Parameters after so many plain conjugate-gradient steps from the mean: few steps regularise."""
        solution = conjugate_gradients(
            self.curvature, self.curvature.terms(self.moves), torch.zeros_like(self.start), max_steps=steps
        )
        return self.matrix.scatter(self.start + solution.x)
