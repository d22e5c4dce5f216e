"""What rules for low-rank pairs share: their options, what they ask of clients, the mean of all else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from fedmerge.adapters.low_rank_pairs import Pair, check_pair_patterns
from fedmerge.adapters.scalings import pair_scaling
from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.state import State
from fedmerge.statistics.adapter_scaling import AdapterScaling
from fedmerge.statistics.statistic_type import Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["PairRule"]


@dataclass(frozen=True)
class PairRule(Aggregator):
    """Merges low-rank pairs by a rule of its own, and averages all other parameters.

    Parameters
    ----------
    pairs
        One's own names of pairs, each as ``"A:B"``, see :func:`~fedmerge.adapters.find_pairs`; peft's are known.
    alpha
        Gives the scaling ``alpha / r`` of the server's pairs, and of clients that do not tell theirs. Needed only
        where neither the model nor the clients tell, and ranks or alphas differ.
    rank_stabilized
        Whether that is ``alpha / sqrt(r)``.
    """

    pairs: tuple[str, ...] = field(default=(), kw_only=True)
    alpha: float | None = field(default=None, kw_only=True)
    rank_stabilized: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_pair_patterns(self.pairs)
        if self.alpha is not None:
            pair_scaling(1, self.alpha)

    @property
    def pair_patterns(self) -> tuple[str, ...]:
        """As given."""
        return self.pairs

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The scaling of each client's pairs, of those who tell."""
        return (AdapterScaling(self.pairs),)

    def merged_pair(self, pair: Pair, given: PairUpdates) -> tuple[Tensor, Tensor]:
        """The merged B [out, r] and A [r, in] of one pair, to be multiplied by the server's scaling."""
        raise NotImplementedError

    def given(self, updates: Iterable[ClientUpdate], context: MergeContext) -> PairUpdates:
        """The updates, read."""
        name = type(self).__name__
        return PairUpdates.of(updates, context, name, self.pairs, self.alpha, self.rank_stabilized)

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Merge pair after pair."""
        given = self.given(updates, context)
        merged = given.means()
        for pair in given.pairs:
            merged |= pair.tensors(*self.merged_pair(pair, given), like=given.updates[0].state)
        return merged, {}
