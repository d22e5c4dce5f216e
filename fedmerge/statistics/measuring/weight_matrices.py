"""Weights as matrices, in the form that curvature speaks of; and the layers that act as one such matrix on rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.errors import InvalidOption
from fedmerge.state import State

__all__ = [
    "MatrixLayer",
    "WeightMatrix",
    "bias_of",
    "check_factor_shape",
    "example_gradients",
    "gram",
    "matrix_layers",
    "reordered_factor",
    "symmetric",
]


@dataclass(frozen=True)
class WeightMatrix:
    """One weight, its bias if there is one, and the matrix that the two make.

    A weight [out, in, ...] is ``groups`` matrices [out / groups, d] on rows of length d: in for a linear
    layer, (in / groups) * kernel for a convolution, plus 1 with a bias.

    Parameters
    ----------
    weight, bias
        Names of the parameters.
    shape
        Of the weight.
    groups
        More than 1 only for grouped convolutions.

    Examples
    --------
    >>> matrix = WeightMatrix("fc.weight", "fc.bias", (3, 2))
    >>> matrix.gather({"fc.weight": torch.zeros(3, 2), "fc.bias": torch.ones(3)})[0, 0]
    tensor([0., 0., 1.])
    """

    weight: str
    bias: str | None
    shape: tuple[int, ...]
    groups: int = 1

    @classmethod
    def measured_by(cls, weight: str, factor: Tensor, state: State) -> WeightMatrix:
        """The matrix of `weight` in `state` that an input factor [d, d] or [groups, d, d] belongs to."""
        shape = tuple(state[weight].shape)
        with_bias = factor.shape[-1] != state[weight][0].numel()
        return cls(weight, bias_of(weight) if with_bias else None, shape, len(factor) if factor.ndim == 3 else 1)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters that the matrix holds."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def rows(self) -> int:
        """Outputs of one group."""
        return self.shape[0] // self.groups

    @property
    def columns(self) -> int:
        """Length d of the rows that it is applied to."""
        return torch.Size(self.shape[1:]).numel() + (self.bias is not None)

    @property
    def is_convolution(self) -> bool:
        """Whether rows are patches of an input rather than whole inputs."""
        return len(self.shape) > 2

    def gather(self, state: State) -> Tensor:
        """The matrix [groups, out / groups, d] out of a state, in float32 or better."""
        weight = state[self.weight].reshape(self.shape[0], -1)
        if self.bias is not None:
            weight = torch.cat([weight, state[self.bias].reshape(-1, 1).to(weight)], 1)
        return weight.reshape(self.groups, self.rows, self.columns)

    def scatter(self, matrix: Tensor) -> dict[str, Tensor]:
        """A matrix [groups, out / groups, d] as parameters: the inverse of :meth:`gather`."""
        flat = matrix.reshape(self.shape[0], self.columns)
        if self.bias is None:
            return {self.weight: flat.reshape(self.shape)}
        return {self.weight: flat[:, :-1].reshape(self.shape), self.bias: flat[:, -1].clone()}


def bias_of(weight: str) -> str:
    """The name of the bias beside a weight, as torch names both.

    Examples
    --------
    >>> bias_of("fc.weight"), bias_of("lstm.weight_ih_l0")
    ('fc.bias', 'lstm.bias_ih_l0')
    """
    layer, dot, name = weight.rpartition(".")
    return f"{layer}{dot}{name.replace('weight', 'bias', 1)}"


def check_factor_shape(statistic: str, weight: str, side: str, factor_shape: tuple[int, ...], state: State) -> None:
    """Check the shape of a factor of inputs (side ``"A"``) or outputs (``"G"``) against the weight that it belongs to.

    Raises
    ------
    InvalidOption
        There is no such weight, or the size fits neither it nor it with its bias.
    """
    if weight not in state or state[weight].ndim < 2:
        raise InvalidOption(f"statistic {statistic!r}: the model has no weight matrix {weight!r}")
    shape = state[weight].shape
    groups = max(1, factor_shape[0]) if len(factor_shape) == 3 else 1
    wanted = shape[1:].numel()
    sizes = {shape[0] // groups} if side == "G" else {wanted, wanted + 1} if bias_of(weight) in state else {wanted}
    square = len(factor_shape) in (2, 3) and factor_shape[-1] == factor_shape[-2] and factor_shape[-1] in sizes
    if not square or shape[0] % groups or (groups > 1 and len(shape) == 2):
        raise InvalidOption(
            f"statistic {statistic!r}: factor {side} of {weight!r} has shape {list(factor_shape)}, "
            f"the weight [{', '.join(map(str, shape))}] wants a square one of {' or '.join(map(str, sorted(sizes)))}"
        )


def reordered_factor(weight: str, side: str, factor: Tensor, state: State, move: Callable[[State], State]) -> Tensor:
    """One factor, of inputs (side ``"A"``) or outputs (``"G"``), once `move` has re-ordered the neurons of a model.

    Raises
    ------
    InvalidOption
        The layer has groups, between which neurons have moved.
    """
    shape = state[weight].shape
    if side == "G":
        numbers = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        index = move({weight: numbers})[weight].reshape(shape[0], -1)[:, 0]
    else:
        numbers = torch.arange(shape[1:].numel()).reshape(1, *shape[1:]).expand(shape)
        index = move({weight: numbers})[weight][0].flatten()
        if factor.shape[-1] == len(index) + 1:
            index = torch.cat([index, torch.tensor([len(index)])])  # the bias stays the last
    if bool((index == torch.arange(len(index))).all()):
        return factor
    if factor.ndim == 3:
        raise InvalidOption(f"neurons of {weight!r}, a convolution with groups, have moved: its factors cannot follow")
    return factor[index][:, index]


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
    layers = []
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
        layers.append(MatrixLayer(WeightMatrix(weight, bias, tuple(own["weight"].shape), groups), module))
    return layers


def gram(rows: Tensor) -> Tensor:
    """``sum r r^T`` over examples and positions, [groups, d, d] in float64, of rows [B, groups, T, d].

    Symmetric to the bit, which a matrix product is not on every processor.
    """
    flat = rows.transpose(0, 1).flatten(1, 2)
    return symmetric(torch.matmul(flat.transpose(1, 2), flat).double())


def symmetric(matrix: Tensor) -> Tensor:
    """``(M + M^T) / 2`` of matrices [..., d, d]."""
    return (matrix + matrix.transpose(-1, -2)) / 2
