"""FedIT: the factors of low-rank pairs averaged apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.adapters.low_rank_pairs import Pair
from fedmerge.aggregators.pair_rule import PairRule
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.errors import AdapterError
from fedmerge.registry import register

__all__ = ["FedIt", "mean_factors"]


@register("fedit", paper="arXiv:2305.05644")
@dataclass(frozen=True)
class FedIt(PairRule):
    """Average of the factors A and of the factors B, each by itself, and of all other parameters.

    Zhang et al. 2023, section 3: ``A = sum_i p_i A_i``, ``B = sum_i p_i B_i``. Their product is not the average of the
    updates, for it has cross terms ``p_i p_j B_i A_j``: it depends on how each client has turned its factors. Here B_i
    counts in units of the server's scaling, so clients may have unequal alphas, but not unequal ranks.

    Examples
    --------
    >>> from fedmerge.update import ClientUpdate, MergeContext
    >>> sent = [{"lora_A.weight": torch.ones(1, 2) * i, "lora_B.weight": torch.ones(1, 1) * i} for i in (0.0, 2.0)]
    >>> merged, _ = FedIt().merge([ClientUpdate(i, s) for i, s in enumerate(sent)], MergeContext(), {})
    >>> (merged["lora_B.weight"] @ merged["lora_A.weight"]).tolist()  # the mean of the updates is [[2.0, 2.0]]
    [[1.0, 1.0]]
    """

    def merged_pair(self, pair: Pair, given: PairUpdates) -> tuple[Tensor, Tensor]:
        """The two means.

        Raises
        ------
        AdapterError
            Ranks are unequal.
        """
        return mean_factors(pair, given)


def mean_factors(pair: Pair, given: PairUpdates) -> tuple[Tensor, Tensor]:
    """``sum_i p_i B_i`` and ``sum_i p_i A_i``.

    Raises
    ------
    AdapterError
        Ranks are unequal.
    """
    ranks = [len(given.updates[i].state[pair.a]) for i in range(len(given.updates))]
    held = [rank for rank in given.own_ranks(pair) if rank]
    if len(set(held)) > 1 or len(set(ranks)) > 1:
        raise AdapterError(
            f"{given.method} averages the factors of {pair.layer!r}, and clients hold ranks {sorted(set(held))} of it: "
            "give all one rank, or take flexlora, flora, hetlora or core_space"
        )
    terms = given.terms(pair)
    b, a = torch.zeros_like(terms[0].b), torch.zeros_like(terms[0].a)
    for term in terms:
        b.add_(term.b * term.weight)
        a.add_(term.a * term.weight)
    return b, a
