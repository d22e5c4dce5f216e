"""WUDI: the merged update that disturbs no client's own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.task_vectors import TaskVectors, is_matrix
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Wudi"]


@register("wudi", paper="arXiv:2503.08099")
@dataclass(frozen=True)
class Wudi(Aggregator):
    """The update that differs least from each client's, on the inputs that the client's own update tells of.

    Cheng et al. 2025, equation 13: the rows of a client's update ``tau_i`` of a weight matrix span the inputs that it
    was trained on, so without data ``sum_i w_i ||(tau - tau_i) tau_i^T||^2`` is minimised over tau, with
    ``w_i = K p_i / ||tau_i||^2``; p_i is the client's share of the examples, and equal shares give the paper's. It is
    RegMean with ``tau_i^T tau_i`` in place of Gram matrices. Kernels of convolutions are matrices
    [out, in * k * k]; biases and other vectors are averaged.

    Parameters
    ----------
    solver
        ``"exact"``: the minimum, which scales with the updates. ``"adam"``: as published, Adam's steps from the sum
        of the updates, whose size is that of `learning_rate` whatever the size of the updates.
    ridge
        For ``"exact"``: how strongly tau is held to the mean update, in parts of the mean diagonal of
        ``sum_i w_i tau_i^T tau_i``; positive, near 0 the paper's minimum. Of inputs that updates hardly tell of, that
        minimum follows whichever client tells most, which costs clients that train from scratch dearly.
    steps, learning_rate
        For ``"adam"``: how many steps, at least 0, and how long in units of parameters, positive.

    Examples
    --------
    >>> base = {"w": torch.zeros(1, 2)}
    >>> sent = [ClientUpdate(i, {"w": torch.eye(2)[i : i + 1]}) for i in range(2)]
    >>> Wudi(ridge=1e-6).merge(sent, MergeContext(base=base), {})[0]["w"]
    tensor([[1.0000, 1.0000]])
    """

    separable = "tensor"
    requires_base: ClassVar[bool] = True

    solver: Literal["exact", "adam"] = "exact"
    ridge: float = 0.1
    steps: int = 300
    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        if self.solver not in ("exact", "adam"):
            raise InvalidOption(f'Wudi: solver must be "exact" or "adam", got {self.solver!r}')
        check_range(self, "ridge", 1e-12, math.inf, open_high=True)
        check_range(self, "steps", 0, math.inf, open_high=True)
        check_range(self, "learning_rate", 1e-30, math.inf, open_high=True)

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Solve for tensor after tensor; the memory stays empty."""
        vectors, merged = TaskVectors.of(updates, context, "wudi"), {}
        for name in vectors.names:
            step = vectors.mean(name)
            if is_matrix(step):
                step = self._solved(vectors, name, step.flatten(1).double()).to(step.dtype).view(step.shape)
            merged[name] = vectors.base[name] + step
        return merged, {}

    def _solved(self, vectors: TaskVectors, name: str, mean: Tensor) -> Tensor:
        """Where ``(tau - mean) total = target``: small differences keep their digits."""
        clients, columns = len(vectors), mean.shape[1]
        target, total = torch.zeros_like(mean), mean.new_zeros(columns, columns)
        for share, vector in zip(vectors.shares, vectors.each(name), strict=True):
            own = vector.flatten(1).double()
            size = float(torch.linalg.vector_norm(own)) ** 2
            if size > 0:
                weight = share * clients / size
                if 2 * len(own) < columns:  # kernels of convolutions: the shorter way round their Gram matrix
                    total.addmm_(own.T, own, alpha=weight)
                    target.addmm_((own - mean) @ own.T, own, alpha=weight)
                else:
                    gram = own.T @ own
                    total.add_(gram, alpha=weight)
                    target.addmm_(own - mean, gram, alpha=weight)
        if self.solver == "adam":
            return mean + self._descended((clients - 1) * mean, target, total)
        unit = total.diagonal().mean()
        if unit <= 0:
            return mean
        total.diagonal().add_(self.ridge * unit)
        factor = torch.linalg.cholesky(total)
        del total  # as large as many models where kernels are long
        return mean + torch.cholesky_solve(target.T, factor).T

    def _descended(self, start: Tensor, target: Tensor, total: Tensor) -> Tensor:
        """Adam's steps down ``||tau||^2`` as `total` measures it, less twice its product with `target`."""
        step = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([step], lr=self.learning_rate)
        for _ in range(self.steps):
            step.grad = 2 * (step.detach() @ total - target)
            optimizer.step()
        return step.detach()
