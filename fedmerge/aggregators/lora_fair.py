"""LoRA-FAIR: averaged factors, B being corrected towards the average of the updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.adapters.low_rank_pairs import Pair
from fedmerge.aggregators.fedit import mean_factors
from fedmerge.aggregators.pair_rule import PairRule
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register

__all__ = ["LoraFair"]


@register("lora_fair", paper="arXiv:2411.14961")
@dataclass(frozen=True)
class LoraFair(PairRule):
    """Average of the factors, and to B what brings the product near the average of the updates.

    Bian et al. 2024, equations 7 and 8: with the means A and B, ``dB`` minimises the distance of ``(B + dB) A`` to
    ``M = sum_i p_i B_i A_i`` plus ``regularization`` times the size of dB. The authors take gradient steps on a cosine;
    here both are squares, so that ``dB = (M - B A) A^T (A A^T + l I)^-1``, in which no full matrix is made. With l = 0
    the product is M projected onto the rows of A.

    Parameters
    ----------
    regularization
        l, in units of the mean of the diagonal of ``A A^T``; the authors take 0.01.

    Examples
    --------
    >>> from fedmerge.update import ClientUpdate, MergeContext
    >>> sent = [{"lora_A.weight": torch.ones(1, 2) * i, "lora_B.weight": torch.ones(1, 1) * i} for i in (0.0, 2.0)]
    >>> merged, _ = LoraFair(0.0).merge([ClientUpdate(i, s) for i, s in enumerate(sent)], MergeContext(), {})
    >>> (merged["lora_B.weight"] @ merged["lora_A.weight"]).tolist()
    [[2.0, 2.0]]
    """

    regularization: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "regularization", 0.0, math.inf, open_high=True)

    def merged_pair(self, pair: Pair, given: PairUpdates) -> tuple[Tensor, Tensor]:
        """Means, and the correction.

        Raises
        ------
        AdapterError
            Ranks are unequal.
        """
        b, a = mean_factors(pair, given)
        rows = a.double()
        gram = rows @ rows.T
        towards = -(b.double() @ gram)
        for term in given.terms(pair):
            towards += term.b.double() @ (term.a.double() @ rows.T) * term.weight
        unit = float(gram.diagonal().mean()) if len(gram) else 0.0
        damped = gram + self.regularization * unit * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return b + (towards @ torch.linalg.pinv(damped, hermitian=True)).to(b), a
