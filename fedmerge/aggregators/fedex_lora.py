"""FedEx-LoRA: averaged factors, and what their product lacks goes into the base."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmerge.adapters.low_rank_pairs import Pair
from fedmerge.adapters.small_cores import Term
from fedmerge.aggregators.fedit import mean_factors
from fedmerge.aggregators.folding_rule import FoldingRule
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.registry import register

__all__ = ["FedExLora"]


@register("fedex_lora", paper="arXiv:2410.09432")
@dataclass(frozen=True)
class FedExLora(FoldingRule):
    """Average of the factors, as in ``fedit``, and what is missing to the average of the updates added to the base.

    Singhal et al. 2024, equations 9 to 11: with the means A and B,
    ``W0 += sum_i p_i s_i B_i A_i - s B A``, so that the model is exactly the average, whatever the factors. The
    residual travels as the factors that it is made of, of rank ``r + sum_i r_i``.
    """

    def divided(self, pair: Pair, given: PairUpdates) -> tuple[tuple[Tensor, Tensor], list[Term]]:
        """The means, and the residual.

        Raises
        ------
        AdapterError
            Ranks are unequal.
        """
        b, a = mean_factors(pair, given)
        return (b, a), [*given.terms(pair), Term(b, a, -1.0)]
