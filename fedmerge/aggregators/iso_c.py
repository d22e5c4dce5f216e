"""Iso-C: isotropic merging in the common subspace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedmerge.aggregators.aggregator import Fold
from fedmerge.aggregators.spectra import leading
from fedmerge.aggregators.task_vectors import is_matrix
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State, accumulator_dtype
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["IsoC"]


@dataclass
class _Total:
    tensors: dict[str, Tensor]
    weight: float = 0.0
    clients: int = 0


@register("iso_c", paper="arXiv:2502.04959")
@dataclass(frozen=True)
class IsoC(Fold[_Total]):
    """The sum of the clients' updates, of equal strength in every direction in which it has any.

    Marczak et al. 2025, equations 5 to 7: each weight matrix of the summed updates is ``U diag(s) V^T``, and becomes
    ``mean(s) U V^T``, the mean over all min(out, in) singular values. So what few clients want, which a sum of many
    has but little of, counts as much as what all want. Kernels of convolutions are matrices [out, in * k * k]; biases
    and other vectors are averaged. Directions in which the sum is zero stay zero, where a decomposition would take
    arbitrary ones. Updates count by their examples: with p_i the clients' shares the sum is ``K sum_i p_i tau_i``.

    Parameters
    ----------
    scale
        alpha, by which the merged update is multiplied, vectors too; at least 0. The authors choose it on validation
        data. At 1 a matrix moves by a sum over clients and yet not far, for most directions of it are weak.

    Examples
    --------
    >>> import torch
    >>> base = {"w": torch.zeros(2, 2)}
    >>> sent = [ClientUpdate(0, {"w": torch.diag(torch.tensor([4.0, 2.0]))})]
    >>> IsoC().merge(sent, MergeContext(base=base), {})[0]["w"]
    tensor([[3., 0.],
            [0., 3.]])
    """

    separable = "tensor"
    requires_base: ClassVar[bool] = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "scale", 0.0, math.inf, open_high=True)

    def zero(self, context: MergeContext) -> _Total:
        """No update."""
        return _Total({})

    def add(self, total: _Total, update: ClientUpdate, context: MergeContext) -> _Total:
        """Add one client's task vector."""
        base = context.required_base("iso_c")
        for name, tensor in update.state.items():
            moved = (tensor.to(accumulator_dtype(tensor.dtype)) - base[name]) * update.weight
            total.tensors[name] = total.tensors[name].add_(moved) if name in total.tensors else moved
        total.weight += update.weight
        total.clients += 1
        return total

    def join(self, total: _Total, other: _Total) -> _Total:
        """Add the sums."""
        for name, tensor in other.tensors.items():
            total.tensors[name] = total.tensors[name].add_(tensor) if name in total.tensors else tensor
        return _Total(total.tensors, total.weight + other.weight, total.clients + other.clients)

    def finish(self, total: _Total, context: MergeContext, memory: State) -> tuple[State, State]:
        """Even out the spectrum of every matrix."""
        base, merged = context.required_base("iso_c"), {}
        for name in list(total.tensors):
            step = total.tensors.pop(name).div_(total.weight)
            if is_matrix(step):
                step = _isotropic(step.flatten(1)).to(step.dtype).mul_(total.clients).view(step.shape)
            merged[name] = step.mul_(self.scale).add_(base[name])
        return merged, {}


def _isotropic(matrix: Tensor) -> Tensor:
    left, values, right = leading(matrix)
    even: Tensor = values.sum() / min(matrix.shape) * (left @ right.T)
    return even
