"""TIES: task vectors are trimmed, elect a sign for every coordinate, and only those of that sign are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Separable
from fedmerge.aggregators.task_vector_fold import CoordinateFold, Sums, TaskVector
from fedmerge.aggregators.trimmed_vector import TrimmedVector
from fedmerge.edits.delta import parts
from fedmerge.lookup.option_checks import check_range, check_word
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Ties"]


@register("ties", paper="arXiv:2306.01708")
@dataclass(frozen=True)
class Ties(CoordinateFold):
    """Largest changes of each client; in every coordinate, the mean of those that have the elected sign.

    Yadav et al. 2023, algorithm 1, with ``tau_i = theta_i - theta_0``. Trim: the largest share of each tau_i stays,
    the rest is 0. Elect: ``g = sign(sum_i p_i tau_i)`` in every coordinate. Disjoint merge: the mean of the tau_i of
    sign g, weighted by p_i; ``theta+ = theta_0 + scale * mean``. A coordinate that one client alone moved gets all
    of what it did. All that is known from sums over clients of positive and of negative changes, apart.

    Four implementations differ; written with the options here, all clients counting alike, they are

    - the authors': ``ties(disjoint=mean_by_count)``, of which they search `scale` from 0.8 to 2.5;
    - FusionBench: ``ties(scale=0.3, disjoint=sum)``;
    - mergekit: ``ties(density=1, scope=tensor, undecided=positive)``, its weights being those of the clients;
    - peft: ``ties(scope=tensor, elect=unweighted, disjoint=mean_by_count, undecided=positive)``, its density being
      what one chooses.

    Where numbers are equally large, as zeros are, those that come first stay, so that exactly a share does; the
    authors keep more. Their code trims buffers too. Behind an edit that trims already, take ``density=1``:
    ``dare(density=0.2)+ties(density=1)``.

    Parameters
    ----------
    scale
        lambda, the factor on the merged task vector.
    density
        Share of each task vector that stays, in (0, 1]; 1 trims nothing.
    scope
        What is trimmed to it: the ``"global"`` task vector of a client, or each ``"tensor"``.
    elect
        ``"weighted"``: clients elect the sign with their weights; ``"unweighted"``: each as if it had the mean of them.
    disjoint
        What those of the elected sign give: their weighted ``"mean"``; ``"mean_by_count"``, the same sum divided by
        their number instead of their weights, in units of the clients' mean weight; or that ``"sum"``.
    undecided
        The sign where the changes cancel: the ``"majority"`` of all coordinates, or ``"positive"``.

    Examples
    --------
    >>> from fedmerge import MergeContext
    >>> base = {"w": torch.zeros(3)}
    >>> sent = [ClientUpdate(0, {"w": torch.tensor([3.0, -1.0, 0.2])})]
    >>> sent += [ClientUpdate(1, {"w": torch.tensor([1.0, 4.0, 0.1])})]
    >>> Ties(density=0.67).merge(sent, MergeContext(base=base), {})[0]["w"]
    tensor([2., 4., 0.])
    """

    density: float = 0.2
    scope: Literal["global", "tensor"] = "global"
    elect: Literal["weighted", "unweighted"] = "weighted"
    disjoint: Literal["mean", "mean_by_count", "sum"] = "mean"
    undecided: Literal["majority", "positive"] = "majority"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "density", 0.0, 1.0, open_low=True)
        check_word(self, "scope", ("global", "tensor"))
        check_word(self, "elect", ("weighted", "unweighted"))
        check_word(self, "disjoint", ("mean", "mean_by_count", "sum"))
        check_word(self, "undecided", ("majority", "positive"))

    @property
    def separable(self) -> Separable:
        """A share of all entries of a model is a look at the whole of it."""
        return "tensor" if self.scope == "tensor" or self.density == 1 else "never"

    @property
    def kept(self) -> int:
        """Sums of positive and negative changes; who made them; the election."""
        return 2 + 2 * (self.disjoint != "sum") + (self.elect == "unweighted")

    def vector(self, update: ClientUpdate, base: State) -> TaskVector:
        """The trimmed task vector."""
        if self.density == 1:
            return TaskVector(update, base)
        return TrimmedVector(update, base, self.density, self.scope)

    def include(self, sums: Sequence[Tensor], piece: Tensor, weight: float) -> None:
        """Add positive and negative changes to their sums."""
        if self.elect == "unweighted":
            sums[-1].add_(piece)
        if self.disjoint != "sum":
            vote = weight if self.disjoint == "mean" else 1.0
            sums[2].add_((piece > 0).to(piece) * vote)
            sums[3].add_((piece < 0).to(piece) * vote)
        piece.mul_(weight)
        sums[0].add_(piece.clamp(min=0))
        sums[1].add_(piece.clamp_(max=0))

    def finish(self, total: Sums, context: MergeContext, memory: State) -> tuple[State, State]:
        """Find the sign of the majority, which all coordinates have a part in, and step."""
        if self.undecided == "majority":
            total.majority = sum(
                float(self._elected([each[part] for each in sums]).sign().sum())
                for sums, _ in total.tensors.values()
                for part in parts(len(sums[0]))
            )
        return super().finish(total, context, memory)

    def combine(self, sums: Sequence[Tensor], total: Sums) -> Tensor:
        """Take the sum of the elected sign, and divide."""
        elected = self._elected(sums)
        positive = elected > 0 if total.majority < 0 else elected >= 0
        merged = torch.where(positive, sums[0], sums[1])
        if self.disjoint != "sum":
            votes = torch.where(positive, sums[2], sums[3])
            merged.div_(torch.where(votes > 0, votes, 1.0))
        return merged if self.disjoint == "mean" else merged.mul_(total.unit)

    def _elected(self, sums: Sequence[Tensor]) -> Tensor:
        return sums[-1] if self.elect == "unweighted" else sums[0] + sums[1]
