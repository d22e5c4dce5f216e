"""Sums of Kronecker products: the curvature of one layer over all clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.curvature.conjugate_gradients import Solution, conjugate_gradients

__all__ = ["KroneckerSum"]

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
            found = conjugate_gradients(
                coarse,
                (residual / norm).float(),
                torch.zeros_like(residual, dtype=torch.float32),
                precondition=lambda r: r / divisor,
                tolerance=max(_COARSE, 0.5 * tolerance / reached),
                max_steps=max_steps - steps,
            )
            x = x + norm * found.x.double()
            residual = first - rotated(x)
            before, reached = reached, float(residual.norm() / first.norm())
            steps, definite = steps + max(found.steps, 1), found.definite
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
