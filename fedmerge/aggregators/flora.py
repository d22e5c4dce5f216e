"""FLoRA: the clients' pairs are stacked and added to the base; all go on with new ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmerge.adapters.folded_base import fresh_pair
from fedmerge.adapters.low_rank_pairs import Pair
from fedmerge.adapters.small_cores import Term
from fedmerge.aggregators.folding_rule import FoldingRule
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.registry import register

__all__ = ["Flora"]


@register("flora", paper="arXiv:2409.05976")
@dataclass(frozen=True)
class Flora(FoldingRule):
    """The average of the updates, added to the frozen weights as stacked factors; then new pairs for all.

    Wang et al. 2024, section 3.2: ``[p_1 s_1 B_1, p_2 s_2 B_2, ...] [A_1; A_2; ...] = sum_i p_i s_i B_i A_i`` exactly,
    for unequal ranks too. It goes into the base, and the next round starts from B = 0 and a newly drawn A, the same for
    all. Bytes to a client grow with the number of clients, up to the size of the weights themselves.
    """

    def divided(self, pair: Pair, given: PairUpdates) -> tuple[tuple[Tensor, Tensor], list[Term]]:
        """A fresh pair, and all that the clients have learnt."""
        like = given.updates[0].state
        return fresh_pair(pair, like, given.context.seed, given.context.round), given.terms(pair)
