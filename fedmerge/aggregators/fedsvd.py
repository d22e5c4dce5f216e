"""FedSVD: B is averaged, then the product is factored anew with an orthonormal A."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmerge.adapters.low_rank_pairs import Pair
from fedmerge.adapters.small_cores import Term, best_of_rank
from fedmerge.aggregators.held_mean import HeldMean
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.lookup.option_checks import check_count
from fedmerge.registry import register

__all__ = ["FedSvd"]


@register("fedsvd", paper="arXiv:2505.12805")
@dataclass(frozen=True)
class FedSvd(HeldMean):
    """Average of the factors B, as in ``ffa_lora``; then the same product in other factors, A having orthonormal rows.

    Lee et al. 2025: ``B A = U S V^T``, and the next round starts from ``A = V^T``, ``B = U S``. A follows what has been
    learnt although no client trains it, and its rows of length one bound how far noise on B reaches.

    Parameters
    ----------
    every
        After how many rounds the factors are made anew, at least 1.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.update import ClientUpdate, MergeContext
    >>> base = {"lora_A.weight": torch.tensor([[3.0, 4.0]]), "lora_B.weight": torch.zeros(1, 1)}
    >>> sent = [ClientUpdate(0, {**base, "lora_B.weight": torch.ones(1, 1)})]
    >>> merged, _ = FedSvd().merge(sent, MergeContext(base=base), {})
    >>> round(float(merged["lora_A.weight"].norm()), 5), (merged["lora_B.weight"] @ merged["lora_A.weight"]).tolist()
    (1.0, [[3.0, 4.0]])
    """

    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "every", 1)

    def merged_pair(self, pair: Pair, given: PairUpdates) -> tuple[Tensor, Tensor]:
        """The mean, in other factors."""
        b, a = super().merged_pair(pair, given)
        # Of embeddings B is held, and is a basis as it was drawn.
        if given.context.round % self.every or pair.kind == "embedding":
            return b, a
        return best_of_rank([Term(b, a)], given.rank(pair))
