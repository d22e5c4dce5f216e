"""Sums of Kronecker products: the curvature of one layer over all clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.curvature.conjugate_gradients import Solution, conjugate_gradients

__all__ = ["KroneckerSum"]


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
        total = torch.zeros(())
        for i, (a, g) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            total = total + g @ (matrices[i] if matrices.ndim == 4 else matrices) @ a
        return total

    def __call__(self, matrix: Tensor) -> Tensor:
        """Apply to one matrix."""
        return self.terms(matrix) + self.ridge * matrix

    @property
    def mean_diagonal(self) -> float:
        """Mean of the operator's diagonal, ridge aside: the natural unit of a ridge."""
        traces = self.inputs.diagonal(dim1=-2, dim2=-1).mean(-1) * self.outputs.diagonal(dim1=-2, dim2=-1).mean(-1)
        return float(traces.sum(0).mean())

    def preconditioner(self) -> _Inverse:
        """The inverse of the Kronecker product of mean factors, in the operator's units, plus the ridge."""
        a, g = self.inputs.mean(0), self.outputs.sum(0)
        scale = self.mean_diagonal / max(float((_mean_diagonal(a) * _mean_diagonal(g)).mean()), 1e-300)
        a_values, a_vectors = torch.linalg.eigh(a)
        g_values, g_vectors = torch.linalg.eigh(g)
        products = scale * g_values.clamp_min(0)[..., :, None] * a_values.clamp_min(0)[..., None, :]
        # Where curvature vanishes the preconditioner must not blow rounding errors up.
        floor = self.ridge + 1e-9 * float(products.max())
        return _Inverse(a_vectors, g_vectors, 1.0 / (products + max(floor, 1e-300)))

    def solve(self, target: Tensor, start: Tensor, *, tolerance: float, max_steps: int) -> Solution:
        """Solve ``self(X) = target`` by preconditioned conjugate gradients from `start`."""
        return conjugate_gradients(
            self, target, start, precondition=self.preconditioner(), tolerance=tolerance, max_steps=max_steps
        )


@dataclass(frozen=True)
class _Inverse:
    a_vectors: Tensor
    g_vectors: Tensor
    scales: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        rotated = self.g_vectors.transpose(-1, -2) @ x @ self.a_vectors
        return self.g_vectors @ (rotated * self.scales) @ self.a_vectors.transpose(-1, -2)


def _grouped(factor: Tensor) -> Tensor:
    factor = factor.double()
    return factor if factor.ndim == 3 else factor[None]


def _mean_diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1)
