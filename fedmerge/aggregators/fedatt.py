"""FedAtt: attentive aggregation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Fold
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State, accumulator_dtype
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["FedAtt"]


@dataclass
class _Attention:
    """A softmax over clients in one pass: sums of ``exp(s_i - peak)`` and of that times the difference."""

    total: Tensor
    weight: float = 0.0
    peak: float = -math.inf

    def add(self, difference: Tensor, score: float) -> None:
        if score > self.peak:
            shrink = math.exp(self.peak - score)
            self.total.mul_(shrink)
            self.weight *= shrink
            self.peak = score
        weight = math.exp(score - self.peak)
        self.total.add_(difference, alpha=weight)
        self.weight += weight

    def join(self, other: _Attention) -> None:
        peak = max(self.peak, other.peak)
        mine, theirs = math.exp(self.peak - peak), math.exp(other.peak - peak)
        self.total.mul_(mine).add_(other.total, alpha=theirs)
        self.weight = mine * self.weight + theirs * other.weight
        self.peak = peak


@dataclass
class _Total:
    tensors: dict[str, _Attention] = field(default_factory=dict)


@register("fedatt", paper="arXiv:1812.07108")
@dataclass(frozen=True)
class FedAtt(Fold[_Total]):
    """Each tensor moves towards the clients by attention: the farther a client's tensor, the more it counts.

    Ji et al. 2019, algorithm 1: per tensor k, ``s_i = ||theta_0[k] - theta_i[k]||``, ``a = softmax(s)`` over
    clients, ``theta+[k] = theta_0[k] - step_size * sum_i a_i (theta_0[k] - theta_i[k]) + noise * N(0, 1)``.
    Example counts play no part. Kernels of convolutions are taken as matrices ``[out, in * k * k]``.

    Parameters
    ----------
    step_size
        epsilon; 1 stays within the clients' hull, the authors' 1.2 goes a fifth beyond.
    norm
        ``"spectral"``: the largest singular value of matrices, as the authors' code; ``"frobenius"``: the
        entry-wise norm of the paper. Vectors have their Euclidean norm either way.
    noise
        Standard deviation of Gaussian noise on every parameter; the authors' code has 0.001.
    """

    separable = "tensor"
    step_size: float = 1.2
    norm: Literal["spectral", "frobenius"] = "spectral"
    noise: float = 0.0

    requires_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, "step_size", 0.0, math.inf, open_high=True)
        check_range(self, "noise", 0.0, math.inf, open_high=True)
        if self.norm not in ("spectral", "frobenius"):
            raise InvalidOption(f'FedAtt: norm must be "spectral" or "frobenius", got {self.norm!r}')

    def zero(self, context: MergeContext) -> _Total:
        """No client yet."""
        return _Total()

    def add(self, total: _Total, update: ClientUpdate, context: MergeContext) -> _Total:
        """Add one client to the running softmax of every tensor."""
        base = context.required_base("fedatt")
        for name, tensor in update.state.items():
            difference = tensor.to(accumulator_dtype(tensor.dtype)) - base[name]
            if name not in total.tensors:
                total.tensors[name] = _Attention(torch.zeros_like(difference))
            total.tensors[name].add(difference, self._distance(difference))
        return total

    def join(self, total: _Total, other: _Total) -> _Total:
        """Bring both softmaxes to the higher peak, and add."""
        for name, attention in other.tensors.items():
            if name in total.tensors:
                total.tensors[name].join(attention)
            else:
                total.tensors[name] = attention
        return total

    def finish(self, total: _Total, context: MergeContext, memory: State) -> tuple[State, State]:
        """Step towards the attentive mean, with noise where asked for."""
        base = context.required_base("fedatt")
        merged = {}
        for name, attention in total.tensors.items():
            merged[name] = base[name] + attention.total.mul_(self.step_size / attention.weight)
            if self.noise:
                # A stream per tensor: the order of names, which a checkpoint may change, must not matter.
                generator = context.torch_generator(f"fedatt noise {name}")
                noise = torch.randn(merged[name].shape, generator=generator, dtype=merged[name].dtype)
                merged[name] += self.noise * noise.to(merged[name].device)
        return merged, {}

    def _distance(self, difference: Tensor) -> float:
        if difference.is_complex():
            difference = torch.view_as_real(difference)
        if difference.ndim < 2 or self.norm == "frobenius":
            return float(torch.linalg.vector_norm(difference.double()))
        return spectral_norm(difference.flatten(1))


def spectral_norm(matrix: Tensor) -> float:
    """Largest singular value of a matrix [m, n], by the eigenvalues of its smaller Gram matrix in float64."""
    matrix = matrix.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0)) if gram.numel() else 0.0
