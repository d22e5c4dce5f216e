"""Diagonal of the Fisher information of a client's model on its own examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmerge.registry import register
from fedmerge.seeding import torch_generator
from fedmerge.state import State, trained_names
from fedmerge.statistics.layer_statistic import FisherStatistic
from fedmerge.statistics.measuring.measurable import Measurable, check_parameter_shape, doubted_parameters
from fedmerge.statistics.measuring.squared_gradients import SquaredGradients, add_squares
from fedmerge.statistics.measuring.taps import Probe, Tapped, pieces, probe, stored_dtype
from fedmerge.statistics.measuring.written_out import add_scales
from fedmerge.statistics.sending.soundness import squares
from fedmerge.statistics.statistic_type import Batches, Shapes
from fedmerge.training.report import TrainingReport

__all__ = ["FisherDiag"]


@register("fisher_diag")
@dataclass(frozen=True)
class FisherDiag(FisherStatistic):
    """``F_j = E_x sum_c p(c|x) (d log p(c|x) / d theta_j)^2``, one number per parameter under its name.

    The square is of each example's own gradient: that of a batch's sum is another thing. Linear layers,
    convolutions and LSTMs are measured in closed form from their inputs and output gradients, everything
    else (norms, embeddings, attention, free parameters) through ``torch.func``. Per example, so that a
    client's share is ``n_i F_i``. Takes as many bytes as the parameters that it covers, in float32 (float64
    for a model in float64).

    Its parameters are those of :class:`~fedmerge.statistics.layer_statistic.FisherStatistic`.

    Examples
    --------
    >>> model = nn.Linear(2, 3)
    >>> value = FisherDiag().measure(model, [(torch.randn(8, 2), torch.zeros(8, dtype=torch.long))], None)
    >>> value["weight"].shape
    torch.Size([3, 2])
    """

    name: ClassVar[str] = "fisher_diag"

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure in one pass over the examples, in evaluation mode, on a copy."""
        generator = torch_generator(0, "sampled labels")
        total: dict[str, Tensor] = {}
        probed: Probe | None = None
        tasks = self.tasks(model, batches)
        count = 0
        for inputs, targets in self.limited(batches):
            if probed is None:
                probed = probe(model, inputs, self.selects, scales=True)
                total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in self._measured(model).items()}
            for x, y in pieces(probed, inputs, targets):
                with torch.enable_grad():
                    outputs, tapped = probed.forward(x)
                self._add(total, probed, tapped, x, outputs, self.vectors(tasks, x, outputs, y, generator))
            count += len(targets)
        return {name: (value / count).to(stored_dtype(model)) for name, value in total.items()}

    @staticmethod
    def _add(
        total: dict[str, Tensor],
        probed: Probe,
        tapped: list[Tapped],
        x: Tensor,
        outputs: Tensor,
        at_outputs: Iterator[Tensor],
    ) -> None:
        matrices, scales = tapped[: len(probed.layers)], tapped[len(probed.layers) :]
        squares = [SquaredGradients.of(layer, taps) for layer, taps in zip(probed.layers, matrices, strict=True)]
        vectors = []
        for vector in at_outputs:
            gradients = probed.gradients(outputs, tapped, vector)
            for sums, at_calls in zip(squares, gradients[: len(squares)], strict=True):
                sums.add(at_calls)
            add_scales(total, probed.scales, [taps.inputs for taps in scales], gradients[len(squares) :])
            vectors.append(vector)
        for sums in squares:
            for name, value in sums.layer.matrix.scatter(sums.total()).items():
                total[name] += value
        if probed.others:
            add_squares(total, probed.model, probed.others, x, torch.stack(vectors))

    def _measured(self, model: nn.Module) -> dict[str, Tensor]:
        trained = trained_names(model)
        return {name: p for name, p in model.named_parameters() if name in trained and self.selects(name)}

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """Those of parameters."""
        for name, shape in shapes.items():
            check_parameter_shape(self.name, name, shape, state)

    def doubt(self, shapes: Shapes, state: State, model: Measurable) -> str | None:
        """A parameter that is not trained, or one that is and is missing."""
        return doubted_parameters(model, shapes, self.selects)

    def check(self, value: State, state: State) -> None:
        """Finite, bounded, not negative, and of the parameters' shapes."""
        self.received(value, state)

    def received(self, value: State, state: State) -> State:
        """In float32 or better."""
        self.check_shapes({name: tuple(tensor.shape) for name, tensor in value.items()}, state)
        return {name: squares(self.name, name, tensor) for name, tensor in value.items()}

    def reordered(self, value: State, state: State, move: Callable[[State], State]) -> State:
        """Entries follow their parameters."""
        return dict(move(value))
