"""Low-rank adapters: pairs of factors in a state, their sums without full matrices, and a minimal LoRA of our own."""

from fedmerge.adapters.inject import fold, folded_state, lora
from fedmerge.adapters.low_rank_pairs import Pair, find_pairs
from fedmerge.adapters.own_ranks import Adapters, OwnRanks
from fedmerge.adapters.scalings import pair_scaling, scaling_of, scalings
from fedmerge.adapters.small_cores import Cores, Term, best_of_rank, norm_of_sum, total

__all__ = [
    "Adapters",
    "Cores",
    "OwnRanks",
    "Pair",
    "Term",
    "best_of_rank",
    "find_pairs",
    "fold",
    "folded_state",
    "lora",
    "norm_of_sum",
    "pair_scaling",
    "scaling_of",
    "scalings",
    "total",
]
