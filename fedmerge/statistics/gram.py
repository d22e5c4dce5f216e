"""Gram matrices of the inputs of every linear layer and convolution of a client's model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics.layer_statistic import LayerStatistic
from fedmerge.statistics.measuring.measurable import Measurable, doubted_factors
from fedmerge.statistics.measuring.taps import LayerSums, Probe, factor, pieces, probe, stored_dtype
from fedmerge.statistics.measuring.weight_matrices import check_factor_shape, reordered_factor
from fedmerge.statistics.sending.soundness import semidefinite
from fedmerge.statistics.statistic_type import Batches, Shapes
from fedmerge.training.report import TrainingReport

__all__ = ["Gram"]


@register("gram")
@dataclass(frozen=True)
class Gram(LayerStatistic):
    """``mean a a^T`` over examples and positions, with rows a of inputs, under the weight's name.

    Rows are those of :class:`~fedmerge.statistics.FisherKfac`: unfolded patches of a convolution, the steps
    of an LSTM, a final 1 where the layer has a bias. Shape [d, d], or [groups, d, d] for a grouped
    convolution: ``4 d^2`` bytes a layer. Layers that are no matrix (norms, embeddings, attention) have none.

    Parameters
    ----------
    layers, examples
        See :class:`~fedmerge.statistics.layer_statistic.LayerStatistic`.

    Examples
    --------
    >>> model = nn.Linear(2, 3, bias=False)
    >>> Gram().measure(model, [(torch.eye(2), torch.zeros(2))], None)["weight"]
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """

    name: ClassVar[str] = "gram"

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure in one forward pass over the examples, in evaluation mode, on a copy."""
        probed: Probe | None = None
        sums = LayerSums()
        for inputs, targets in self.limited(batches):
            probed = probed or probe(model, inputs, self.selects)
            for x, _ in pieces(probed, inputs, targets):
                with torch.no_grad():
                    _, tapped = probed.forward(x)
                sums.add_inputs(probed.layers, tapped)
        means = {name: factor(total / sums.positions[name]) for name, total in sums.grams.items()}
        return {name: value.to(stored_dtype(model)) for name, value in means.items()}

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """Only factors of layers, of the layers' sizes."""
        for name, shape in shapes.items():
            check_factor_shape(self.name, name, "A", shape, state)

    def doubt(self, shapes: Shapes, state: State, model: Measurable) -> str | None:
        """Factors of other layers, or with another column for the bias, or of other groups."""
        return doubted_factors(model, {(name, "A"): shape for name, shape in shapes.items()}, state)

    def of_inputs(self, name: str) -> bool:
        """All do."""
        return True

    def check(self, value: State, state: State) -> None:
        """Of the layers' sizes, see :func:`~fedmerge.statistics.sending.soundness.semidefinite`."""
        self.received(value, state)

    def received(self, value: State, state: State) -> State:
        """Without negative eigenvalues."""
        self.check_shapes({name: tuple(tensor.shape) for name, tensor in value.items()}, state)
        return {name: semidefinite(self.name, name, tensor) for name, tensor in value.items()}

    def reordered(self, value: State, state: State, move: Callable[[State], State]) -> State:
        """Rows and columns follow the neurons that go in."""
        return {name: reordered_factor(name, "A", tensor, state, move) for name, tensor in value.items()}
