"""raFLoRA: every slice of a pair is averaged over the clients that hold it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.adapters.low_rank_pairs import Pair
from fedmerge.aggregators.pair_rule import PairRule
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.registry import register

__all__ = ["RaFlora"]


@register("raflora", paper="arXiv:2602.13486")
@dataclass(frozen=True)
class RaFlora(PairRule):
    """Average of factors of unequal ranks, slice by slice over those clients whose rank reaches it.

    After the rank-partitioned aggregation of arXiv:2602.13486: where slices that few clients hold are averaged with
    the zeros of all others, as in ``hetlora``, they shrink from round to round, until the rank has collapsed to the
    smallest. Here ``A[j] = sum_i p_i A_i[j] / sum_i p_i`` over the clients with ``r_i > j``, and ``B[:, j]`` likewise.
    Equal ranks give ``fedit``. A slice that nobody holds stays as it was sent.

    Examples
    --------
    >>> from fedmerge.update import ClientUpdate, MergeContext
    >>> like = {"lora_A.weight": torch.zeros(2, 1), "lora_B.weight": torch.zeros(1, 2)}
    >>> sent = [ClientUpdate(0, {"lora_A.weight": torch.tensor([[2.0], [4.0]]), "lora_B.weight": torch.ones(1, 2)})]
    >>> sent += [ClientUpdate(1, {"lora_A.weight": torch.tensor([[0.0], [0.0]]), "lora_B.weight": torch.eye(2)[:1]})]
    >>> RaFlora().merge(sent, MergeContext(base=like), {})[0]["lora_A.weight"].tolist()
    [[1.0], [4.0]]
    """

    def merged_pair(self, pair: Pair, given: PairUpdates) -> tuple[Tensor, Tensor]:
        """The two means, slice by slice."""
        terms, start = given.terms(pair), given.start(pair)
        held = torch.zeros(given.rank(pair), dtype=torch.float64, device=terms[0].b.device)
        b, a = torch.zeros_like(terms[0].b), torch.zeros_like(terms[0].a)
        for term, rank in zip(terms, given.own_ranks(pair), strict=True):
            held[:rank] += term.weight
            b[:, :rank] += term.b[:, :rank] * term.weight
            a[:rank] += term.a[:rank] * term.weight
        shares = torch.where(held > 0, held, 1.0).to(b)
        b, a = b / shares, a / shares[:, None]
        if start is not None:
            b, a = torch.where(held > 0, b, start.b), torch.where((held > 0)[:, None], a, start.a)
        return b, a
