"""Sinkhorn re-basin: permutations learnt as doubly stochastic matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedmerge.aggregators.aligning import Permuting
from fedmerge.lookup.option_checks import check_count, check_range
from fedmerge.matching.fairness import anchor_of, bounded
from fedmerge.matching.soft_permutations import learn_permutations
from fedmerge.permutations import PermutationSpec
from fedmerge.registry import register
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["SinkhornRebasin"]


@register("sinkhorn_rebasin", paper="arXiv:2212.12042")
@dataclass(frozen=True)
class SinkhornRebasin(Permuting):
    """Permutations of all layers learnt together as soft matrices, made hard at the end; then the average.

    Pena et al. 2023. Each group of neurons has scores X, all zero at first, and the soft permutation that Sinkhorn's
    iterations make of ``X / temperature``. AdamW lowers ``sum_l ||W_A[l] - P[l] W_B[l] P[l-1]^T||^2``; no data are
    needed. The authors round the last X; here the scores are rounded after every step, and the hard matching nearest
    in weights is kept, the order in which neurons came among them. So soft matrices never reach the merge, and it is
    never farther than without matching. Gradients go through the iterations themselves. All clients are matched to
    the most typical one. Heads of attention, and groups of a norm, are matched by inner products of weights.

    Parameters
    ----------
    steps
        Of AdamW, at least 1.
    learning_rate
        Of AdamW, in units of scores, above 0.
    temperature
        What scores are divided by, above 0: the smaller, the harder the matrices.
    iterations
        Of Sinkhorn's scaling of rows and columns, at least 1.

    Examples
    --------
    >>> import torch, fedmerge
    >>> a, b = (torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)) for _ in range(2))
    >>> order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    >>> b.load_state_dict({"0.weight": a[0].weight[order], "0.bias": a[0].bias[order],
    ...                    "2.weight": a[2].weight[:, order], "2.bias": a[2].bias})
    <All keys matched successfully>
    >>> merged = fedmerge.merge([a, b], "sinkhorn_rebasin", example=torch.randn(2, 3))
    >>> torch.equal(merged[0].weight, a[0].weight)
    True
    """

    steps: int = 50
    learning_rate: float = 0.1
    temperature: float = 1.0
    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "steps", 1)
        check_count(self, "iterations", 1)
        check_range(self, "learning_rate", 0.0, float("inf"), open_low=True, open_high=True)
        check_range(self, "temperature", 0.0, float("inf"), open_low=True, open_high=True)

    def permutations(
        self, spec: PermutationSpec, updates: Sequence[ClientUpdate], context: MergeContext
    ) -> list[list[Tensor]]:
        """Of every client, to the most typical one; of two, to the heavier."""
        trained = bounded([context.trained(u.state, "SinkhornRebasin") for u in updates])
        anchor = anchor_of(trained, [u.weight for u in updates])
        perms = [spec.identity() for _ in updates]
        for j, state in enumerate(trained):
            if j != anchor:
                perms[j], _ = learn_permutations(
                    spec,
                    trained[anchor],
                    state,
                    steps=self.steps,
                    learning_rate=self.learning_rate,
                    temperature=self.temperature,
                    iterations=self.iterations,
                )
        return perms
