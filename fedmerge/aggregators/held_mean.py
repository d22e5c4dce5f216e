"""What rules share under which clients train one factor of a pair, the other being the same for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmerge.adapters.low_rank_pairs import Pair
from fedmerge.aggregators.pair_rule import PairRule
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.training.rules.held_factors import HeldFactors

__all__ = ["HeldMean"]


@dataclass(frozen=True)
class HeldMean(PairRule):
    """Average of the factor that was trained; the other is that of the model sent.

    With one factor common, the product is linear in the other: the mean is exactly that of the updates, for unequal
    ranks too, whose clients hold the first slices.
    """

    requires_base: ClassVar[bool] = True
    holds: ClassVar[Literal["A", "B", "turns"]] = "A"

    @property
    def local_rule(self) -> HeldFactors:
        """Which factor clients hold still."""
        return HeldFactors(self.holds, self.pairs)

    def merged_pair(self, pair: Pair, given: PairUpdates) -> tuple[Tensor, Tensor]:
        """The mean of one factor beside the other, as it was."""
        given.context.required_base(given.method)
        start, terms = given.start(pair), given.terms(pair)
        assert start is not None
        if pair.b in self.local_rule.held((pair.a, pair.b), given.context.round):
            # A client with a scaling of its own has taken up B in units of the server's: its A needs no other.
            return start.b.clone(), sum((term.a * term.weight for term in terms), torch.zeros_like(start.a))
        return sum((term.b * term.weight for term in terms), torch.zeros_like(start.b)), start.a.clone()
