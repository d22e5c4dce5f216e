"""What a least-squares refit of a layer needs: the merged model's inputs against the client's own pre-activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics.layer_statistic import ComparingStatistic
from fedmerge.statistics.measuring.measurable import Measurable, doubted_factors
from fedmerge.statistics.measuring.taps import Probe, factor, pieces, probe, stored_dtype
from fedmerge.statistics.measuring.weight_matrices import check_factor_shape, gram
from fedmerge.statistics.sending.soundness import FIXED_POINT, semidefinite, sound
from fedmerge.statistics.statistic_type import Batches, Shapes

__all__ = ["RefitSums"]


@register("refit_sums")
@dataclass(frozen=True)
class RefitSums(ComparingStatistic):
    """Second moments of a merged model's inputs h to each layer, and the client's own pre-activations z against them.

    ``S = mean h h^T`` [d, d] under ``<weight>.S`` and ``Z = mean z h^T`` [out, d] under ``<weight>.Z``, over examples
    and positions: unfolded patches of a convolution, a final 1 where there is a bias; one such matrix a group. The
    client's own model runs on its own, from the inputs up, and only its z are taken. ``4 d (d + out)`` bytes a layer.

    Parameters
    ----------
    layers, examples
        See :class:`~fedmerge.statistics.layer_statistic.LayerStatistic`.

    Examples
    --------
    >>> merged, own = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    >>> value = RefitSums().compare(merged, own, [(torch.eye(2), torch.zeros(2))])
    >>> bool((2 * value["weight.Z"] - own.weight).abs().max() < 1e-6)
    True
    """

    name: ClassVar[str] = "refit_sums"

    def compare(self, model: nn.Module, own: nn.Module, batches: Batches) -> State:
        """Measure in one forward pass of both models, in evaluation mode, on copies."""
        probes: tuple[Probe, Probe] | None = None
        total: dict[str, Tensor] = {}
        positions: dict[str, int] = {}
        for inputs, targets in self.limited(batches):
            probes = probes or (probe(model, inputs, self.selects), probe(own, inputs, self.selects))
            for x, _ in pieces(probes[0], inputs, targets):
                for weight, rows, wanted in _pairs(*probes, x):
                    for part, product in ((f"{weight}.S", gram(rows)), (f"{weight}.Z", _product(wanted, rows))):
                        total[part] = total[part] + product if part in total else product
                        positions[part] = positions.get(part, 0) + rows.shape[0] * rows.shape[2]
        return {part: factor(value / positions[part]).to(stored_dtype(model)) for part, value in total.items()}

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """Both matrices of a layer, of its size."""
        for name, shape in shapes.items():
            weight, _, part = name.rpartition(".")
            if part not in ("S", "Z") or f"{weight}.S" not in shapes or f"{weight}.Z" not in shapes:
                raise InvalidOption(f"statistic {self.name!r}: want S and Z of every weight, got {sorted(shapes)[:6]}")
            if part == "S":
                check_factor_shape(self.name, weight, "A", shape, state)
                rows, wanted = len(state[weight]) // (shape[0] if len(shape) == 3 else 1), shapes[f"{weight}.Z"]
                if wanted != (*shape[:-2], rows, shape[-1]):
                    raise InvalidOption(f"statistic {self.name!r}: Z of {weight!r} has shape {list(wanted)}")

    def doubt(self, shapes: Shapes, state: State, model: Measurable) -> str | None:
        """Sums of other layers, or with another column for the bias, or of other groups."""
        inputs = {(name[:-2], "A"): shape for name, shape in shapes.items() if name.endswith(".S")}
        return doubted_factors(model, inputs, state)

    def check(self, value: State, state: State) -> None:
        """Real numbers, finite and bounded, of layers' sizes, and S as every Gram matrix is."""
        self.received(value, state)

    def received(self, value: State, state: State) -> State:
        """Without negative eigenvalues in S."""
        self.check_shapes({name: tuple(tensor.shape) for name, tensor in value.items()}, state)
        return {
            n: semidefinite(self.name, n, t, FIXED_POINT) if n.endswith(".S") else sound(self.name, n, t)
            for n, t in value.items()
        }


def _pairs(merged: Probe, own: Probe, x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of each call of each layer: rows [B, groups, T, d] that the merged model puts in, and rows that its own gives."""
    with torch.no_grad():
        seen, trained = merged.forward(x)[1], own.forward(x)[1]
    theirs = {layer.matrix.weight: (layer, taps) for layer, taps in zip(own.layers, trained, strict=True)}
    for layer, taps in zip(merged.layers, seen, strict=True):
        if layer.matrix.weight in theirs:
            other, theirs_here = theirs[layer.matrix.weight]
            for h, z in zip(taps.inputs, theirs_here.outputs, strict=True):
                yield layer.matrix.weight, layer.input_rows(h), other.output_rows(other.without_bias(z.detach()))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``sum l r^T`` over examples and positions of rows [B, groups, T, ...], in float64."""
    flat = [rows.transpose(0, 1).flatten(1, 2) for rows in (left, right)]
    return torch.matmul(flat[0].transpose(1, 2), flat[1]).double()
