"""One layer's quadratic over all clients, as methods with Kronecker-factored curvature share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmerge.curvature.collected import Collected
from fedmerge.curvature.conjugate_gradients import conjugate_gradients
from fedmerge.curvature.kronecker import KroneckerSum
from fedmerge.statistics.weight_matrices import WeightMatrix

__all__ = ["LayerSystem"]


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
        found = self.curvature.solve(
            self.curvature.terms(self.moves), torch.zeros_like(self.start), tolerance=tolerance, max_steps=max_steps
        )
        return self.matrix.scatter(self.start + found.x), found.residual, found.definite

    def stepped(self, steps: int) -> dict[str, Tensor]:
        """Parameters after so many plain conjugate-gradient steps from the mean: few steps regularise."""
        found = conjugate_gradients(
            self.curvature, self.curvature.terms(self.moves), torch.zeros_like(self.start), max_steps=steps
        )
        return self.matrix.scatter(self.start + found.x)
