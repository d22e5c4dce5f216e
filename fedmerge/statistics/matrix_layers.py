"""Layers that act as one matrix on rows: linear layers, and convolutions on their unfolded patches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.statistics.weight_matrices import WeightMatrix

__all__ = ["MatrixLayer", "example_gradients", "gram", "matrix_layers", "symmetric"]

_Conv = (nn.Conv1d, nn.Conv2d)
_KINDS = (nn.Linear, *_Conv)


@dataclass(frozen=True)
class MatrixLayer:
    """A module, and the matrix of its weight and bias."""

    matrix: WeightMatrix
    module: nn.Module

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The weight, and the bias where the matrix has it."""
        weight, bias = self.module.weight, self.module.bias
        return tuple(p for p in (weight, None if self.matrix.bias is None else bias) if isinstance(p, Tensor))

    def input_rows(self, x: Tensor) -> Tensor:
        """What the matrix is applied to, [B, groups, T, d]: T positions of an example, 1 for plain inputs."""
        rows = _patches(self.module, x) if isinstance(self.module, _Conv) else x.reshape(len(x), 1, -1, x.shape[-1])
        return F.pad(rows, (0, 1), value=1.0) if self.matrix.bias is not None else rows

    def output_rows(self, g: Tensor) -> Tensor:
        """Outputs, or gradients by them, as rows [B, groups, T, out / groups]."""
        if isinstance(self.module, _Conv):
            return g.reshape(len(g), self.matrix.groups, self.matrix.rows, -1).transpose(2, 3)
        return g.reshape(len(g), 1, -1, g.shape[-1])

    def without_bias(self, outputs: Tensor) -> Tensor:
        """Outputs as the matrix alone gives them, where a bias stands beside it."""
        bias = self.module.bias
        if self.matrix.bias is not None or not isinstance(bias, Tensor):
            return outputs
        return outputs - bias.detach().reshape(-1, *[1] * (outputs.ndim - 2) if isinstance(self.module, _Conv) else ())

    def rows(self, calls: Sequence[Tensor]) -> list[Tensor]:
        """Input rows of every call."""
        return [self.input_rows(inputs) for inputs in calls]


def example_gradients(layer: MatrixLayer, rows: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Every example's gradient ``sum_t g_t a_t^T`` of a layer's matrix, [B, groups, out / groups, d].

    `rows` are its input rows and `gradients` those by its outputs, one each per call.
    """
    products = [layer.output_rows(g).transpose(2, 3) @ a for a, g in zip(rows, gradients, strict=True)]
    return torch.stack(products).sum(0) if len(products) > 1 else products[0]


def _patches(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Unfolded inputs [B, groups, T, (in / groups) * kernel] of a convolution, in the order of its weight."""
    sides = conv._reversed_padding_repeated_twice
    if any(sides):
        x = F.pad(x, sides, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    if isinstance(conv, nn.Conv1d):
        x = x.unsqueeze(2)
    kernel, stride, dilation = ((1, *v)[-2:] for v in (conv.kernel_size, conv.stride, conv.dilation))
    columns = F.unfold(x, kernel, dilation, 0, stride)
    return columns.view(len(x), conv.groups, -1, columns.shape[-1]).transpose(2, 3)


def matrix_layers(
    model: nn.Module, names: Mapping[int, str], selects: Callable[[str], bool], trained: Collection[str]
) -> list[MatrixLayer]:
    """The matrix layers of a model whose weight is selected; `names` are its parameters' names by identity.

    A bias that is not among those `trained` is no column of the matrix.

    A weight that several modules share, or that is computed (spectral norm, weight norm), acts as no
    single matrix, so its layers are not among them.
    """
    modules = list(model.modules())
    owners = Counter(id(p) for module in modules for p in module.parameters(recurse=False))
    found = []
    for module in modules:
        # Subclasses may compute something else.
        if type(module) not in _KINDS or "weight" not in module._parameters:
            continue
        own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
        weight = names[id(own["weight"])]
        if any(owners[id(parameter)] > 1 for parameter in own.values()) or not selects(weight):
            continue
        bias = names[id(own["bias"])] if "bias" in own else None
        bias = bias if bias in trained else None
        groups = module.groups if isinstance(module, _Conv) else 1
        found.append(MatrixLayer(WeightMatrix(weight, bias, tuple(own["weight"].shape), groups), module))
    return found


def gram(rows: Tensor) -> Tensor:
    """``sum r r^T`` over examples and positions, [groups, d, d] in float64, of rows [B, groups, T, d].

    Symmetric to the bit, which a matrix product is not on every processor.
    """
    flat = rows.transpose(0, 1).flatten(1, 2)
    return symmetric(torch.matmul(flat.transpose(1, 2), flat).double())


def symmetric(matrix: Tensor) -> Tensor:
    """``(M + M^T) / 2`` of matrices [..., d, d]."""
    return (matrix + matrix.transpose(-1, -2)) / 2
