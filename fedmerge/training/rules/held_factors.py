"""Which factor of low-rank pairs clients hold still, on the client's side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedmerge.adapters.low_rank_pairs import check_pair_patterns, factor_names
from fedmerge.lookup.option_checks import check_word
from fedmerge.registry import register
from fedmerge.training.rules.local_rule import LocalRule

__all__ = ["HeldFactors"]


@register("held_factors")
@dataclass(frozen=True)
class HeldFactors(LocalRule):
    """Train one factor of each low-rank pair, and neither train nor send the other.

    Parameters
    ----------
    factor
        What is held: ``"A"``, which starts with random numbers (of embeddings their B does); ``"B"``; or ``"turns"``,
        A in the first round and every other round after it, B in the rounds between.
    pairs
        One's own names of pairs, see :func:`~fedmerge.adapters.find_pairs`.

    Examples
    --------
    >>> names = ["fc.lora_A.default.weight", "fc.lora_B.default.weight", "head.bias"]
    >>> HeldFactors("turns").held(names, round=1), HeldFactors("turns").held(names, round=2)
    (('fc.lora_A.default.weight',), ('fc.lora_B.default.weight',))
    """

    factor: Literal["A", "B", "turns"] = "A"
    pairs: tuple[str, ...] = ()

    name: ClassVar[str] = "held_factors"

    def __post_init__(self) -> None:
        check_word(self, "factor", ("A", "B", "turns"))
        check_pair_patterns(self.pairs)

    def held(self, names: Sequence[str], round: int) -> tuple[str, ...]:
        """The names of one side."""
        side: Literal["A", "B"] = "A" if self.factor == "A" or (self.factor == "turns" and round % 2 == 1) else "B"
        return factor_names(names, side, self.pairs)
