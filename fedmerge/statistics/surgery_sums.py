"""What surgery on features needs: a merged model's features against those of the client's own model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics.head import gives
from fedmerge.statistics.layer_statistic import ComparingStatistic
from fedmerge.statistics.measuring.measurable import Measurable, doubted_factors
from fedmerge.statistics.measuring.taps import Probe, pieces, probe, stored_dtype
from fedmerge.statistics.measuring.weight_matrices import check_factor_shape, symmetric
from fedmerge.statistics.sending.soundness import FIXED_POINT, semidefinite, sound
from fedmerge.statistics.statistic_type import Batches, Shapes

__all__ = ["SurgerySums"]


@register("surgery_sums")
@dataclass(frozen=True)
class SurgerySums(ComparingStatistic):
    """Second moments of a merged model's features h (a final 1 where the head has a bias), and own features against h.

    ``S = mean h h^T`` [d, d] under ``<weight>.S`` and ``F = mean f h^T`` [features, d] under ``<weight>.F``, of the
    linear layer that gives the outputs; f is what goes into that layer of the model that the client trained itself, on
    the same inputs. ``8 d^2`` bytes; no features of single examples are sent. Nothing where there is no such layer.

    Parameters
    ----------
    layers, examples
        See :class:`~fedmerge.statistics.layer_statistic.LayerStatistic`.

    Examples
    --------
    >>> merged, own = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> {n: tuple(t.shape) for n, t in SurgerySums().compare(merged, own, [(torch.eye(2), torch.zeros(2))]).items()}
    {'1.weight.S': (3, 3), '1.weight.F': (2, 3)}
    """

    name: ClassVar[str] = "surgery_sums"

    def compare(self, model: nn.Module, own: nn.Module, batches: Batches) -> State:
        """Measure in one forward pass of both models, in evaluation mode, on copies."""
        probes: tuple[Probe, Probe] | None = None
        moments, products, weight, count = torch.zeros(0), torch.zeros(0), "", 0
        for inputs, targets in self.limited(batches):
            probes = probes or (probe(model, inputs, self.selects), probe(own, inputs, self.selects))
            for x, _ in pieces(probes[0], inputs, targets):
                pair = _features(*probes, x)
                if pair is None:
                    return {}
                weight, h, f = pair
                square, product = h.T @ h, f.T @ h
                moments, products = (moments + square, products + product) if count else (square, product)
                count += len(h)
        dtype = stored_dtype(model)
        means = {f"{weight}.S": symmetric(moments) / count, f"{weight}.F": products / count}
        return {name: tensor.to(dtype) for name, tensor in means.items()}

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """Both matrices of one linear layer, of its sizes; nothing where there is none."""
        if not shapes:
            return
        weight = next(iter(shapes)).rpartition(".")[0]
        if set(shapes) != {f"{weight}.S", f"{weight}.F"} or weight not in state or state[weight].ndim != 2:
            raise InvalidOption(f"statistic {self.name!r}: want S and F of one linear weight, got {sorted(shapes)[:6]}")
        square, product = shapes[f"{weight}.S"], shapes[f"{weight}.F"]
        check_factor_shape(self.name, weight, "A", square, state)
        if product != (state[weight].shape[1], *square[-1:]):
            raise InvalidOption(f"statistic {self.name!r}: F of {weight!r} has shape {list(product)}")

    def doubt(self, shapes: Shapes, state: State, model: Measurable) -> str | None:
        """Sums of another layer, or with another column for the bias."""
        return doubted_factors(model, {(n[:-2], "A"): shape for n, shape in shapes.items() if n.endswith(".S")}, state)

    def check(self, value: State, state: State) -> None:
        """Real numbers, finite and bounded, of the layer's sizes, and S as every Gram matrix is."""
        self.received(value, state)

    def received(self, value: State, state: State) -> State:
        """Without negative eigenvalues in S."""
        self.check_shapes({name: tuple(tensor.shape) for name, tensor in value.items()}, state)
        return {
            n: semidefinite(self.name, n, t, FIXED_POINT) if n.endswith(".S") else sound(self.name, n, t)
            for n, t in value.items()
        }


def _features(merged: Probe, own: Probe, x: Tensor) -> tuple[str, Tensor, Tensor] | None:
    """The head's weight, rows [n, d] of the merged model's features, a final 1 among them, and [n, features] of the
    client's own, in float64; None where no linear layer of both gives the outputs."""
    with torch.no_grad():
        outputs, seen = merged.forward(x)
        _, theirs = own.forward(x)
    at = next((i for i, taps in enumerate(seen) if gives(taps.outputs, outputs)), None)
    if at is None or not isinstance(merged.layers[at].module, nn.Linear):
        return None
    layer = merged.layers[at]
    there = next((i for i, other in enumerate(own.layers) if other.matrix.weight == layer.matrix.weight), None)
    if there is None or len(theirs[there].inputs) != 1:
        return None
    h = layer.input_rows(seen[at].inputs[0]).flatten(0, 2).double()
    return layer.matrix.weight, h, theirs[there].inputs[0].flatten(0, -2).double()
