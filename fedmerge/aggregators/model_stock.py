"""Model Stock: as far along the mean update as the clients agree on its direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmerge.aggregators.task_vector_fold import Sums, TaskVector, TaskVectorFold
from fedmerge.lookup.option_checks import check_word
from fedmerge.registry import register

__all__ = ["ModelStock", "ratio"]


@register("model_stock", paper="arXiv:2403.19522")
@dataclass(frozen=True)
class ModelStock(TaskVectorFold):
    """Mean update of every tensor, as much shorter as the clients' angles say that it is noise.

    Jang et al. 2024, with ``tau_i = theta_i - theta_0``: ``theta+ = theta_0 + scale * t * sum_i p_i tau_i``,
    ``t = K c / (1 + (K - 1) c)``, c the mean cosine between two clients' tau. Where clients' updates are one common
    direction plus noise of equal length, at right angles, that is the point on the line to the mean which is nearest to
    the common one; for unequal weights the same holds with ``K = 1 / sum_i p_i^2`` and pairs weighted by p_i p_j. One
    client, or equal ones, give FedAvg, and clients at right angles leave the base: t is kept within [0, 1], for
    outside of it the formula leaves the line, and explodes at ``c = -1 / (K - 1)``. Clients that disagree, as under
    label skew, move the model little in a round.

    Cosines are averaged, as mergekit does; their mean is known from a sum over clients, that of angles is not.

    Parameters
    ----------
    scale
        Factor on the merged task vector; the paper has none.
    scope
        Between what angles are measured: ``"tensor"``, or ``"row"`` of every tensor, such as a neuron's weights.

    Examples
    --------
    >>> from fedmerge import ClientUpdate, MergeContext
    >>> sent = [ClientUpdate(i, {"w": torch.tensor(value)}) for i, value in enumerate(([1.0, 0.0], [1.0, 1.0]))]
    >>> ModelStock().merge(sent, MergeContext(base={"w": torch.zeros(2)}), {})[0]["w"]
    tensor([0.8284, 0.4142])
    """

    separable = "tensor"
    scope: Literal["tensor", "row"] = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word(self, "scope", ("tensor", "row"))

    @property
    def kept(self) -> int:
        """The sum, and that of unit vectors."""
        return 2

    def take(self, sums: Sequence[Tensor], vector: TaskVector, name: str, weight: float) -> None:
        """Add ``p_i tau_i`` and ``p_i tau_i / ||tau_i||``, of which nothing is added for what did not move."""
        moved = vector[name]
        if self.scope == "row" and moved.ndim > 1:
            lengths = torch.linalg.vector_norm(moved.flatten(1), dim=1).repeat_interleave(moved.shape[1:].numel())
        else:
            lengths = torch.full((1,), vector.squared_norms[name] ** 0.5, dtype=moved.dtype, device=moved.device)
        flat = moved.reshape(-1).mul_(weight)
        sums[0] += flat
        sums[1] += flat.div_(torch.where(lengths > 0, lengths, 1.0))

    def combined(self, sums: Sequence[Tensor], shape: torch.Size, total: Sums) -> Tensor:
        """The mean, times what the length of the mean unit vector says of the angles."""
        if not len(sums[0]):
            return sums[0]
        rows = shape[0] if self.scope == "row" and len(shape) > 1 else 1
        directions = torch.linalg.vector_norm(sums[1].view(rows, -1), dim=1, dtype=torch.float64) / total.weight
        ratios = ratio(directions.square(), total.squares / total.weight**2).to(sums[0].dtype)
        return sums[0].view(rows, -1).mul_(ratios[:, None] / total.weight).view(-1)


def ratio(agreement: Tensor, alone: float) -> Tensor:
    """t of clients whose weighted mean unit vector has the squared norm `agreement`; `alone` is ``sum_i p_i^2``.

    ``||sum_i p_i u_i||^2 = sum_i p_i^2 + c (1 - sum_i p_i^2)``, c the mean cosine over pairs.

    Examples
    --------
    >>> ratio(torch.tensor([0.5, 1.0, 0.75]), 0.5)  # two clients at angles of 90, 0 and 60 degrees
    tensor([0.0000, 1.0000, 0.6667])
    """
    if 1 - alone < 1e-12:
        return torch.ones_like(agreement)  # one client, which has no angle to anybody
    cosine = ((agreement - alone) / (1 - alone)).clamp(0, 1)
    return cosine / (alone + (1 - alone) * cosine)
