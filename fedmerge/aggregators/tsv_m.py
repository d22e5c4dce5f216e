"""TSV-M: task singular vectors, merged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.spectra import leading, polar
from fedmerge.aggregators.task_vectors import TaskVectors, is_matrix
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["TaskSingularVectors"]


@register("tsv_m", paper="arXiv:2412.00081")
@dataclass(frozen=True)
class TaskSingularVectors(Aggregator):
    """The strongest directions of every client's update, made orthogonal to those of the others.

    Gargiulo et al. 2025, algorithm 1: of each client's update of a weight matrix, ``U_i diag(s_i) V_i^T``, a share of
    the singular values is kept. All clients' left vectors stand side by side in U, the right ones in V, and each of
    the two is replaced by the nearest matrix with orthonormal columns: ``theta_0 + scale * U' diag(s) V'^T``. Kernels
    of convolutions are matrices [out, in * k * k]; biases and other vectors are averaged. The values s_i of a client
    count ``K p_i`` times, with p_i its share of the examples; with equal shares this is the paper's.

    Where vectors of clients depend on each other, columns cannot all be orthonormal: what is zero stays zero, where
    the authors' code takes arbitrary directions. So K equal updates merge to one of them, cut to a K-th of its rank.

    Parameters
    ----------
    kept
        Share of the singular values of each client's matrix that is kept, in (0, 1]; one at least is. Where not
        given, 1 / K: together they are as many as one matrix has.
    scale
        alpha, by which the merged update is multiplied, vectors too; at least 0.

    Examples
    --------
    >>> base = {"w": torch.zeros(2, 2)}
    >>> sent = [ClientUpdate(0, {"w": torch.diag(torch.tensor([4.0, 0.0]))})]
    >>> sent += [ClientUpdate(1, {"w": torch.diag(torch.tensor([0.0, 2.0]))})]
    >>> TaskSingularVectors().merge(sent, MergeContext(base=base), {})[0]["w"]
    tensor([[4., 0.],
            [0., 2.]])
    """

    separable = "tensor"
    requires_base: ClassVar[bool] = True

    kept: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kept is not None:
            check_range(self, "kept", 1e-9, 1.0)
        check_range(self, "scale", 0.0, math.inf, open_high=True)

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Merge tensor after tensor; the memory stays empty."""
        vectors, merged = TaskVectors.of(updates, context, "tsv_m"), {}
        for name in vectors.names:
            step = self._merged(vectors, name) if is_matrix(vectors.base[name]) else vectors.mean(name)
            merged[name] = vectors.base[name] + self.scale * step
        return merged, {}

    def _merged(self, vectors: TaskVectors, name: str) -> Tensor:
        clients = len(vectors)
        shape = vectors.base[name].flatten(1).shape
        # Rounding must not cost a singular value: 0.29 of 100 are 29.
        most = max(1, int(min(shape) * (self.kept or 1 / clients) + 1e-9))
        left, values, right = [], [], []
        for share, vector in zip(vectors.shares, vectors.each(name), strict=True):
            own = leading(vector.flatten(1), most)
            left.append(own[0])
            values.append(own[1] * share * clients)
            right.append(own[2])
        strengths = torch.cat(values)
        if not len(strengths):
            return torch.zeros_like(vectors.of_client(0, name))
        merged = (polar(torch.cat(left, 1)) * strengths) @ polar(torch.cat(right, 1)).T
        return merged.to(vectors.of_client(0, name, slice(0)).dtype).view(vectors.base[name].shape)
