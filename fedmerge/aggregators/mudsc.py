"""MuDSC: neurons matched by their weights and by what they say, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedmerge.aggregators.aligning import Permuting
from fedmerge.lookup.option_checks import check_count, check_range
from fedmerge.matching.activation_costs import Heard
from fedmerge.matching.dual_space import match_dual
from fedmerge.matching.fairness import anchor_of, bounded
from fedmerge.matching.symmetries import sampled_inputs
from fedmerge.permutations import PermutationSpec
from fedmerge.registry import register
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["MuDSC"]


@register("mudsc", paper="arXiv:2403.01753")
@dataclass(frozen=True)
class MuDSC(Permuting):
    """Neurons matched by correlations of their weights and of their activations together; then the average.

    Xu et al. 2024: each group of neurons is assigned on ``S = b C_w + (1 - b) C_a``. C_w are Pearson correlations of
    all weights into and out of a neuron, measured anew as other groups move; C_a those of what neurons say on the
    server's data. Groups are visited again and again, in random order, until five rounds bring no progress. All
    clients are matched to the most typical one, and the best match that was seen is kept, by the mean correlation of
    matched neurons; it is never below that of the order in which they came. Heads of attention, and groups of a norm,
    are matched within each pair first and as a whole then, their weights by inner products. The authors' other way,
    which merges neurons within a model, is :class:`~fedmerge.aggregators.zipit.ZipIt`.

    Parameters
    ----------
    balance
        b, the share of the weights in [0, 1]: 1 is weight matching by correlation, 0 is activation matching.
    sweeps
        At most so many visits to each group, at least 1.
    examples
        At most so many of the server's are listened to, evenly from all its batches; at least 1.

    Examples
    --------
    >>> import torch, fedmerge
    >>> a, b = (torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)) for _ in range(2))
    >>> order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    >>> b.load_state_dict({"0.weight": a[0].weight[order], "0.bias": a[0].bias[order],
    ...                    "2.weight": a[2].weight[:, order], "2.bias": a[2].bias})
    <All keys matched successfully>
    >>> merged = fedmerge.merge([a, b], "mudsc", data=[torch.randn(50, 3)])
    >>> torch.equal(merged[0].weight, a[0].weight)
    True
    """

    requires_data: ClassVar[bool] = True

    balance: float = 0.5
    sweeps: int = 30
    examples: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "balance", 0.0, 1.0)
        check_count(self, "sweeps", 1)
        check_count(self, "examples", 1)

    def permutations(
        self, spec: PermutationSpec, updates: Sequence[ClientUpdate], context: MergeContext
    ) -> list[list[Tensor]]:
        """Of every client, to the most typical one; of two, to the heavier."""
        modules = [context.module(u.state, "MuDSC") for u in updates]
        trained = bounded([context.trained(u.state, "MuDSC") for u in updates])
        anchor = anchor_of(trained, [u.weight for u in updates])
        pairs = [(anchor, j) for j in range(len(updates)) if j != anchor]
        heard = Heard.of(spec, modules, pairs, sampled_inputs(context, "MuDSC", self.examples))
        heard.check([u.client for u in updates])
        generator = context.torch_generator("mudsc")
        perms = [spec.identity() for _ in updates]
        for pair in pairs:
            perms[pair[1]], _ = match_dual(
                spec, trained, heard, pair, balance=self.balance, sweeps=self.sweeps, generator=generator
            )
        return perms
