"""Sums of squared per-example gradients of one layer, in the cheapest form that its inputs allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmerge.statistics.affine_layers import AffineLayer
from fedmerge.statistics.matrix_layers import MatrixLayer, example_gradients
from fedmerge.statistics.taps import Tapped

__all__ = ["SquaredGradients", "add_scales"]


@dataclass
class SquaredGradients:
    """``sum_b sum_v (sum_t g_t a_t^T)^2``, [groups, out / groups, d], over the vectors v added so far.

    With a single position t the square of the product is the product of squares, and all vectors share one
    matrix product at the end; else every example's gradient is formed.
    """

    layer: MatrixLayer
    rows: list[Tensor]
    _sum: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def of(cls, layer: MatrixLayer, taps: Tapped) -> SquaredGradients:
        """Nothing added yet, for what the taps of a forward pass saw."""
        return cls(layer, layer.rows(taps.inputs))

    @property
    def _single(self) -> bool:
        return len(self.rows) == 1 and self.rows[0].shape[2] == 1

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add one vector's gradients at the outputs of every call."""
        if self._single:
            self._sum = self._sum + self.layer.output_rows(gradients[0]).square()
        else:
            self._sum = self._sum + example_gradients(self.layer, self.rows, gradients).square_().sum(0).double()

    def total(self) -> Tensor:
        """The sum, in float64."""
        if not self._single:
            return self._sum
        squares = self.rows[0].square()  # [B, groups, 1, d]
        return torch.einsum("bgto,bgtd->god", self._sum, squares).double()


def add_scales(
    total: dict[str, Tensor],
    layers: Sequence[AffineLayer],
    tapped: Sequence[Tapped],
    gradients: Sequence[Sequence[Tensor]],
) -> None:
    """Add ``sum_b g_b^2`` of scales and shifts to `total`, for one vector's gradients at the outputs of every call."""
    for layer, taps, found in zip(layers, tapped, gradients, strict=True):
        for name, own in layer.example_gradients(taps.inputs, found).items():
            total[name] += own.square().sum(0).double()
