"""Weights as matrices: a layer's weight, and its bias as a last column, in the form that curvature speaks of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.state import State

__all__ = ["WeightMatrix", "bias_of", "check_factor_shape", "reordered_factor"]


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


def check_factor_shape(statistic: str, weight: str, side: str, found: tuple[int, ...], state: State) -> None:
    """Check the shape of a factor of inputs (side ``"A"``) or outputs (``"G"``) against the weight that it belongs to.

    Raises
    ------
    InvalidOption
        There is no such weight, or the size fits neither it nor it with its bias.
    """
    if weight not in state or state[weight].ndim < 2:
        raise InvalidOption(f"statistic {statistic!r}: the model has no weight matrix {weight!r}")
    shape = state[weight].shape
    groups = max(1, found[0]) if len(found) == 3 else 1
    wanted = shape[1:].numel()
    sizes = {shape[0] // groups} if side == "G" else {wanted, wanted + 1} if bias_of(weight) in state else {wanted}
    square = len(found) in (2, 3) and found[-1] == found[-2] and found[-1] in sizes
    if not square or shape[0] % groups or (groups > 1 and len(shape) == 2):
        raise InvalidOption(
            f"statistic {statistic!r}: factor {side} of {weight!r} has shape {list(found)}, "
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
