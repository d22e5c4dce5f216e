"""Sums over examples, matrix layer by matrix layer: what Gram and Kronecker factors have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedmerge.statistics.matrix_layers import MatrixLayer, gram
from fedmerge.statistics.taps import Tapped

__all__ = ["LayerSums", "factor"]


@dataclass
class LayerSums:
    """``sum r r^T`` of the rows of one side, by weight, in float64, and how many positions there were."""

    grams: dict[str, Tensor] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)

    def add_inputs(self, layers: Sequence[MatrixLayer], tapped: Sequence[Tapped]) -> None:
        """Add what went into every layer."""
        for layer, taps in zip(layers, tapped, strict=True):
            for inputs in taps.inputs:
                rows = layer.input_rows(inputs)
                self._add(layer, rows)
                self.positions[layer.matrix.weight] = (
                    self.positions.get(layer.matrix.weight, 0) + rows.shape[0] * rows.shape[2]
                )

    def add_gradients(self, layers: Sequence[MatrixLayer], gradients: Sequence[Sequence[Tensor]]) -> None:
        """Add gradients at the outputs of every layer."""
        for layer, calls in zip(layers, gradients, strict=True):
            for gradient in calls:
                self._add(layer, layer.output_rows(gradient))

    def _add(self, layer: MatrixLayer, rows: Tensor) -> None:
        name, found = layer.matrix.weight, gram(rows)
        self.grams[name] = self.grams[name].add_(found) if name in self.grams else found


def factor(total: Tensor) -> Tensor:
    """One group's factor is a plain matrix."""
    return total[0] if len(total) == 1 else total
