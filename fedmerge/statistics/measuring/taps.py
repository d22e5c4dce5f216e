"""Taps: what goes into each matrix layer in a forward pass, the gradients at what comes out, and sums over both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.inputs import examples_in, rows, split
from fedmerge.models.resize import copy_of
from fedmerge.models.tangent import is_linearised
from fedmerge.state import trained_names
from fedmerge.statistics.measuring.weight_matrices import MatrixLayer, example_gradients, gram, matrix_layers
from fedmerge.statistics.measuring.written_out import AffineLayer, affine_layers, split_norms, unroll
from fedmerge.tasks import as_batch

__all__ = ["LayerSums", "Probe", "Tapped", "factor", "pieces", "probe", "stored_dtype"]


@dataclass
class Tapped:
    """Inputs and outputs of one layer, one pair per call: recurrent layers are called many times."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Probe:
    """A copy of a model in evaluation mode, with taps on its matrix layers, and on scales where these are asked for.

    ``layers`` and ``scales`` are those that a tap serves; ``others`` the parameters that none serves, with their names
    in ``model``, whose recurrent layers and norms are written out.
    """

    model: nn.Module
    layers: tuple[MatrixLayer, ...]
    others: Mapping[str, str]
    scales: tuple[AffineLayer, ...] = ()

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Tapped]]:
        """Outputs of the model, and what each layer of ``layers``, then of ``scales``, saw."""
        with _taps((*self.layers, *self.scales)) as tapped:
            outputs = as_batch(self.model(inputs))
        return outputs, tapped

    def gradients(self, outputs: Tensor, tapped: Sequence[Tapped], vector: Tensor) -> list[list[Tensor]]:
        """``J^T vector`` at the outputs of every call of every layer; the graph is kept for the next vector."""
        flat = [output for taps in tapped for output in taps.outputs]
        if not flat:
            return [[] for _ in tapped]
        from_autograd = torch.autograd.grad(outputs, flat, vector, retain_graph=True, allow_unused=True)
        grads = iter(g if g is not None else torch.zeros_like(o) for g, o in zip(from_autograd, flat, strict=True))
        return [[next(grads) for _ in taps.outputs] for taps in tapped]


@contextmanager
def _taps(layers: Sequence[MatrixLayer | AffineLayer]) -> Iterator[list[Tapped]]:
    tapped = [Tapped() for _ in layers]
    handles = [
        layer.module.register_forward_hook(_tap(taps), with_kwargs=True)
        for layer, taps in zip(layers, tapped, strict=True)
    ]
    try:
        yield tapped
    finally:
        for handle in handles:
            handle.remove()


def _tap(taps: Tapped) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        inputs = args[0] if args else kwargs["input"]
        if not output.requires_grad:
            output = output.requires_grad_()
        taps.inputs.append(inputs.detach())
        taps.outputs.append(output)
        return output.clone()  # what follows may work in place

    return hook


def probe(model: nn.Module, example: Tensor, selects: Callable[[str], bool], *, scales: bool = False) -> Probe:
    """Make a probe of `model`, and find out on `example` which layers its taps serve; `scales` are those of norms.

    Parameters that are not trained are none to measure. A layer is served where the gradient of its parameters is what
    the taps say: not where a model calls it in a way that hooks do not see, or uses its weight elsewhere too.

    Raises
    ------
    InvalidOption
        The model is linearised.
    """
    if is_linearised(model):
        raise InvalidOption(
            "what layers take in cannot be measured of a linearised model, whose layers are at the fixed point that it "
            "is expanded around: measure its plain model"
        )
    copied = copy_of(model).eval()
    trained = trained_names(model)
    every = tuple(name for name, _ in copied.named_parameters() if selects(name) and name in trained)
    for parameter in copied.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_()
    names = {id(parameter): name for name, parameter in copied.named_parameters()}
    unroll(copied)
    if scales:
        split_norms(copied)
    wanted = frozenset(every)
    affine = tuple(affine_layers(copied, names, wanted.__contains__))
    matrices = tuple(matrix_layers(copied, names, wanted.__contains__, trained))
    served = _served(Probe(copied, matrices, {}, affine), example)
    taken = {name for layer in served for name in _names(layer)}
    new_names = {names[id(parameter)]: name for name, parameter in copied.named_parameters()}
    matrices = tuple(layer for layer in served if isinstance(layer, MatrixLayer))
    others = {name: new_names[name] for name in every if name not in taken}
    return Probe(copied, matrices, others, tuple(layer for layer in served if isinstance(layer, AffineLayer)))


def _names(layer: MatrixLayer | AffineLayer) -> tuple[str, ...]:
    return layer.matrix.names if isinstance(layer, MatrixLayer) else layer.names


def _served(trial: Probe, example: Tensor) -> tuple[MatrixLayer | AffineLayer, ...]:
    """Layers whose tapped gradient of the first of two examples is the one that autograd finds."""
    example = rows(example, slice(2))
    with torch.enable_grad():
        outputs, tapped = trial.forward(example)
        vector = torch.zeros_like(outputs)
        vector[0] = torch.linspace(1, 2, vector[0].numel()).to(outputs).view_as(vector[0])
        every_gradient = trial.gradients(outputs, tapped, vector)
        every: tuple[MatrixLayer | AffineLayer, ...] = (*trial.layers, *trial.scales)
        served = []
        for layer, taps, gradients in zip(every, tapped, every_gradient, strict=True):
            wanted = torch.autograd.grad(outputs, layer.parameters, vector, retain_graph=True, allow_unused=True)
            if any(len(x) != examples_in(example) for x in taps.inputs) or not taps.inputs:
                continue
            pairs = zip(_first_gradient(layer, taps, gradients), wanted, strict=True)
            if all(other is not None and _close(pair_first, other) for pair_first, other in pairs):
                served.append(layer)
    return tuple(served)


def _first_gradient(layer: MatrixLayer | AffineLayer, taps: Tapped, gradients: Sequence[Tensor]) -> list[Tensor]:
    """The first example's, of every parameter."""
    if isinstance(layer, AffineLayer):
        return [by_example[0] for by_example in layer.example_gradients(taps.inputs, gradients).values()]
    return list(layer.matrix.scatter(example_gradients(layer, layer.rows(taps.inputs), gradients)[0]).values())


def _close(first: Tensor, other: Tensor) -> bool:
    return bool((first - other).norm() <= 1e-3 * other.norm())


_BUDGET = 1 << 24  # numbers in the largest temporary of a pass


def pieces(probed: Probe, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch in pieces whose unfolded inputs and per-example gradients stay within bounded memory."""
    with torch.no_grad():
        _, tapped = probed.forward(rows(inputs, slice(1)))
    largest = 1
    for layer, taps in zip(probed.layers, tapped, strict=False):  # scales, which come last, need little
        out, columns = layer.matrix.rows, layer.matrix.columns
        positions = sum(layer.output_rows(o).shape[2] for o in taps.outputs)
        largest = max(largest, layer.matrix.groups * columns * max(positions, out))
    step = max(1, _BUDGET // largest)
    yield from split(inputs, targets, step)


def stored_dtype(model: nn.Module) -> torch.dtype:
    """What sums, kept in float64, are sent as: float32, or the model's own dtype where that is wider."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


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
        name, products = layer.matrix.weight, gram(rows)
        self.grams[name] = self.grams[name].add_(products) if name in self.grams else products


def factor(total: Tensor) -> Tensor:
    """One group's factor is a plain matrix."""
    return total[0] if len(total) == 1 else total
