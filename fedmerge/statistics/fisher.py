"""What every Fisher information has to be told: whose labels it speaks of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.statistics.base import LayerStatistic
from fedmerge.statistics.labels import Estimator, Loss, output_gradients

__all__ = ["FisherStatistic"]


@dataclass(frozen=True)
class FisherStatistic(LayerStatistic):
    """A Fisher information, measured layer by layer.

    Parameters
    ----------
    layers, examples
        See :class:`~fedmerge.statistics.base.LayerStatistic`.
    estimator, loss
        Whose labels: see :func:`~fedmerge.statistics.labels.output_gradients`.
    """

    estimator: Estimator = "auto"
    loss: Loss | None = None

    def vectors(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Vectors v at the outputs with ``F = mean_x sum_v (J^T v)(J^T v)^T``."""
        return output_gradients(outputs, targets, self.estimator, self.loss, generator)
