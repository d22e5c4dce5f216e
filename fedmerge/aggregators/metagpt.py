"""MetaGPT: task vectors weighted by their squared lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedmerge.aggregators.task_vector_fold import CoordinateFold, Sums, TaskVector
from fedmerge.registry import register

__all__ = ["MetaGPT"]


@register("metagpt", paper="arXiv:2406.11385")
@dataclass(frozen=True)
class MetaGPT(CoordinateFold):
    """Task vectors weighted by their squared norms: the farther a client went, the more it counts.

    Zhou et al. 2024, with ``tau_i = theta_i - theta_0`` over the whole model: ``theta+ = theta_0 + scale *
    sum_i lambda_i tau_i``, ``lambda_i = p_i ||tau_i||^2 / sum_k p_k ||tau_k||^2``. It minimises the loss that clients
    have against their own models where losses are quadratic and task vectors orthogonal. The paper's clients count
    alike; the weights p_i are those of the clients' losses in the sum that is minimised. Equal norms give FedAvg. A
    hostile client has only to go far: combine it with clipping.

    Parameters
    ----------
    scale
        Factor on the merged task vector; the paper has none.

    Examples
    --------
    >>> import torch
    >>> from fedmerge import ClientUpdate, MergeContext
    >>> sent = [ClientUpdate(i, {"w": torch.tensor(value)}) for i, value in enumerate(([1.0, 0.0], [0.0, 3.0]))]
    >>> MetaGPT().merge(sent, MergeContext(base={"w": torch.zeros(2)}), {})[0]["w"]
    tensor([0.1000, 2.7000])
    """

    def counts(self, vector: TaskVector) -> float:
        """Its weight times its squared norm."""
        return vector.weight * sum(vector.squared_norms.values())

    def include(self, sums: Sequence[Tensor], piece: Tensor, weight: float) -> None:
        """Add ``p_i ||tau_i||^2 tau_i``."""
        sums[0] += piece.mul_(weight)

    def combine(self, sums: Sequence[Tensor], total: Sums) -> Tensor:
        """Divide by the sum of the factors, unless nobody moved."""
        return sums[0] / (total.weight or 1.0)
