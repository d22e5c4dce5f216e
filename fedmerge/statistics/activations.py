"""What the units of every linear layer and convolution put out on a client's examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics.layer_statistic import LayerStatistic
from fedmerge.statistics.measuring.measurable import Measurable
from fedmerge.statistics.measuring.taps import Probe, Tapped, pieces, probe, stored_dtype
from fedmerge.statistics.measuring.weight_matrices import MatrixLayer
from fedmerge.statistics.sending.soundness import squares
from fedmerge.statistics.statistic_type import Batches, Shapes
from fedmerge.training.report import TrainingReport

__all__ = ["Activations"]

_PARTS = ("mean", "var", "samples")


@register("activations")
@dataclass(frozen=True)
class Activations(LayerStatistic):
    """Mean, variance and some samples of the outputs z of every matrix layer, before any nonlinearity.

    Over examples and positions (of a convolution or a sequence), per unit: ``<weight>.mean`` and
    ``<weight>.var`` [out]; ``<weight>.samples`` [rows, out], one row each from up to `samples` examples, the
    first that come, at positions that run through the layer's. The same for all clients that measure on the
    same examples, and of no use for pairing units where they do not. Takes ``4 out (2 + rows)`` bytes a layer.

    Parameters
    ----------
    layers, examples
        See :class:`~fedmerge.statistics.layer_statistic.LayerStatistic`.
    samples
        Rows to keep per layer, at least 0.

    Examples
    --------
    >>> value = Activations(samples=5).measure(nn.Linear(2, 3), [(torch.randn(8, 2), torch.zeros(8))], None)
    >>> {name: tuple(tensor.shape) for name, tensor in value.items()}
    {'weight.mean': (3,), 'weight.var': (3,), 'weight.samples': (5, 3)}
    """

    name: ClassVar[str] = "activations"

    samples: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.samples, int) or self.samples < 0:
            raise InvalidOption(f"statistic 'activations': samples must be at least 0, got {self.samples}")

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure in one forward pass over the examples, in evaluation mode, on a copy."""
        probed: Probe | None = None
        moments: list[_Moments] = []
        for inputs, targets in self.limited(batches):
            if probed is None:
                probed = probe(model, inputs, self.selects)
                moments = [_Moments(layer) for layer in probed.layers]
            for x, _ in pieces(probed, inputs, targets):
                with torch.no_grad():
                    _, tapped = probed.forward(x)
                for sums, taps in zip(moments, tapped, strict=True):
                    sums.add(taps, self.samples)
        value: dict[str, Tensor] = {}
        for sums in moments:
            value |= sums.value(stored_dtype(model))
        return value

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """All parts of a layer, as long as it is wide."""
        for name, shape in shapes.items():
            weight, _, part = name.rpartition(".")
            if weight not in state or state[weight].ndim < 2 or part not in _PARTS:
                raise InvalidOption(f"statistic 'activations': {name!r} belongs to no weight of the model")
            units = len(state[weight])
            rows = shape[:1] if part == "samples" else ()
            if shape != (*rows, units) or (rows and rows[0] > self.samples):
                raise InvalidOption(
                    f"statistic 'activations': {name!r} has shape {list(shape)}, the layer has {units} units"
                )
            missing = [other for other in _PARTS if f"{weight}.{other}" not in shapes]
            if missing:
                raise InvalidOption(f"statistic 'activations': {f'{weight}.{missing[0]}'!r} is missing")

    def doubt(self, shapes: Shapes, state: State, model: Measurable) -> str | None:
        """Units of other layers."""
        unknown = [name for name in shapes if name.rpartition(".")[0] not in model.matrices]
        return f"{unknown[0]!r} belongs to no linear layer or convolution that the model trains" if unknown else None

    def voted(self, shapes: Shapes) -> Shapes:
        """The layers: a client with few examples has few samples."""
        return {name: shape[-1:] for name, shape in shapes.items()}

    def check(self, value: State, state: State) -> None:
        """Real numbers, finite and bounded, no variance below zero, and as long as the layer is wide."""
        super().check(value, state)
        for name, tensor in value.items():
            if name.endswith(".var"):
                squares(self.name, name, tensor)


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations per unit in float64, merged batch by batch (Chan et al. 1979)."""

    layer: MatrixLayer
    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    deviations: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    samples: list[Tensor] = field(default_factory=list)
    examples: int = 0

    def add(self, taps: Tapped, most: int) -> None:
        for output in taps.outputs:
            rows = self.layer.output_rows(output).transpose(1, 2).flatten(2).double()  # [B, T, out]
            flat = rows.flatten(0, 1)
            mean, total = flat.mean(0), self.count + len(flat)
            shift = mean - self.mean
            self.deviations = (
                self.deviations + (flat - mean).square().sum(0) + shift.square() * self.count * len(flat) / total
            )
            self.mean, self.count = self.mean + shift * len(flat) / total, total
        # The last call's rows: a recurrent layer is called once a step, and its last step saw everything.
        wanted = rows[: max(0, most - self.examples)]
        places = (torch.arange(len(wanted)) + self.examples) % rows.shape[1]
        self.samples.append(wanted[torch.arange(len(wanted)), places])
        self.examples += len(wanted)

    def value(self, dtype: torch.dtype) -> dict[str, Tensor]:
        weight = self.layer.matrix.weight
        parts = {"mean": self.mean, "var": self.deviations / self.count, "samples": torch.cat(self.samples)}
        return {f"{weight}.{part}": tensor.to(dtype) for part, tensor in parts.items()}
