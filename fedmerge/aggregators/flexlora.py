"""FlexLoRA: the average of the updates, cut to the rank of the adapter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmerge.adapters.low_rank_pairs import Pair
from fedmerge.adapters.small_cores import best_of_rank
from fedmerge.aggregators.pair_rule import PairRule
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.registry import register

__all__ = ["FlexLora"]


@register("flexlora", paper="arXiv:2402.11505")
@dataclass(frozen=True)
class FlexLora(PairRule):
    """Average of the low-rank updates, of which the largest singular values stay.

    Bai et al. 2024, section 3.2: ``M = sum_i p_i s_i B_i A_i = U S V^T``, then ``B = U S / s`` and ``A = V^T`` of the
    server's rank r; a client of rank r_i takes the first r_i. What is lost are M's further singular values. The
    decomposition is that of a small core between bases of the stacked factors, so no full matrix is ever made.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.update import ClientUpdate, MergeContext
    >>> sent = [{"lora_A.weight": torch.ones(1, 2) * i, "lora_B.weight": torch.ones(1, 1) * i} for i in (0.0, 2.0)]
    >>> merged, _ = FlexLora().merge([ClientUpdate(i, s) for i, s in enumerate(sent)], MergeContext(), {})
    >>> bool(((merged["lora_B.weight"] @ merged["lora_A.weight"]) - 2).abs().max() < 1e-6)
    True
    """

    def merged_pair(self, pair: Pair, given: PairUpdates) -> tuple[Tensor, Tensor]:
        """The best pair of the server's rank."""
        return best_of_rank(given.terms(pair), given.rank(pair))
