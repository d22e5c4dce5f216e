"""What rules share that add to the frozen weights beside which the pairs stand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedmerge.adapters.folded_base import added, joined_factors
from fedmerge.adapters.low_rank_pairs import Pair
from fedmerge.adapters.small_cores import Term, total
from fedmerge.aggregators.pair_rule import PairRule
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.errors import AdapterError
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["FoldingRule"]


@dataclass(frozen=True)
class FoldingRule(PairRule):
    """Gives new pairs, and adds low-rank updates to the frozen weights of their layers.

    What has been added since the start is remembered as factors, and goes out in the place of the weights.
    """

    requires_base: ClassVar[bool] = True
    moves_base: ClassVar[bool] = True

    @abstractmethod
    def divided(self, pair: Pair, given: PairUpdates) -> tuple[tuple[Tensor, Tensor], list[Term]]:
        """The new B and A, and the terms to be added to the weight; both in units of the server's scaling."""

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Merge pair after pair.

        Raises
        ------
        AdapterError
            The frozen weight of a layer is not known here.
        """
        given = self.given(updates, context)
        context.required_base(given.method)
        merged = given.means()
        kept: dict[str, Tensor] = {}
        for pair in given.pairs:
            weight = pair.weight(context.known)
            if weight is None:
                raise AdapterError(
                    f"{given.method} adds to the frozen weight of layer {pair.layer!r}, which is not known here: pass "
                    "model_fn=, which makes the model with its base frozen"
                )
            factors, terms = self.divided(pair, given)
            merged |= pair.tensors(*factors, like=given.updates[0].state)
            b, a = total(terms)
            b = b * given.scaling(pair)
            if pair.kind == "embedding":
                b, a = a.T, b.T
            merged[weight] = added(context.known[weight], b, a)
            kept |= joined_factors(weight, memory, b, a)
        return merged, kept
