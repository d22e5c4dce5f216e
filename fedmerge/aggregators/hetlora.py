"""HetLoRA: factors of unequal ranks, filled up and weighted by how large each client's update is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.adapters.low_rank_pairs import Pair
from fedmerge.adapters.small_cores import norm_of_sum
from fedmerge.aggregators.pair_rule import PairRule
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.lookup.option_checks import check_word
from fedmerge.registry import register

__all__ = ["HetLora"]


@register("hetlora", paper="arXiv:2401.06432")
@dataclass(frozen=True)
class HetLora(PairRule):
    """Average of factors of unequal ranks, filled up with zeros, weighted by the norm of each client's update.

    Cho et al. 2024, section 3.2: with ``S_i = ||s_i B_i A_i||_F``, the weights are ``w_i = S_i / sum_j S_j``, and
    ``A = sum_i w_i A_i``, ``B = sum_i w_i B_i``. The norms are taken pair by pair, by small matrices. It has the cross
    terms of ``fedit``. The paper's pruning of ranks, which is the clients' own affair, is not part of it.

    Parameters
    ----------
    weigh
        By the ``"norm"`` alone, which is the paper; by ``"both"``, norm times examples; or by ``"examples"``.

    Examples
    --------
    >>> from fedmerge.update import ClientUpdate, MergeContext
    >>> sent = [{"lora_A.weight": torch.ones(1, 1), "lora_B.weight": torch.ones(1, 1) * b} for b in (1.0, 3.0)]
    >>> merged, _ = HetLora().merge([ClientUpdate(i, s) for i, s in enumerate(sent)], MergeContext(), {})
    >>> round(merged["lora_B.weight"].item(), 5)
    2.5
    """

    weigh: str = "norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word(self, "weigh", ("norm", "both", "examples"))

    def merged_pair(self, pair: Pair, given: PairUpdates) -> tuple[Tensor, Tensor]:
        """The two weighted means."""
        terms = given.terms(pair)
        norms = [norm_of_sum([term]) / abs(term.weight) for term in terms] if self.weigh != "examples" else []
        weights = {
            "norm": norms,
            "both": [norm * share for norm, share in zip(norms, given.shares, strict=False)],
            "examples": given.shares,
        }[self.weigh]
        if not sum(weights) > 0:  # nobody has moved from a B of zero
            weights = given.shares
        b, a = torch.zeros_like(terms[0].b), torch.zeros_like(terms[0].a)
        for term, weight in zip(terms, weights, strict=True):
            b.add_(term.b * (weight / sum(weights)))
            a.add_(term.a * (weight / sum(weights)))
        return b, a
