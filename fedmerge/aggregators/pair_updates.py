"""Clients' updates as a rule for low-rank pairs sees them: pairs with their scalings, and all else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from fedmerge.adapters.low_rank_pairs import Pair, find_pairs, rank_of
from fedmerge.adapters.scalings import pair_scaling, scaling_of
from fedmerge.adapters.small_cores import Term
from fedmerge.errors import AdapterError, InvalidOption
from fedmerge.state import WeightedSum
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["PairUpdates"]


@dataclass(frozen=True, eq=False)
class PairUpdates:
    """The updates of one merge.

    Every client's B is in units of the server's scaling: ``s B_i A_i`` with one s for all is what client i has added to
    its layers.

    Parameters
    ----------
    updates
        In client order; pairs of smaller rank are filled up with zeros.
    pairs
        What they have of pairs.
    context
        Base, model and seed of the merge.
    method
        Name, for errors.
    patterns
        Of one's own names of pairs.
    alpha, rank_stabilized
        What gives the scaling of whoever does not tell it; None where the model tells.
    """

    updates: tuple[ClientUpdate, ...]
    pairs: tuple[Pair, ...]
    context: MergeContext
    method: str
    patterns: tuple[str, ...] = ()
    alpha: float | None = None
    rank_stabilized: bool = False

    @classmethod
    def of(
        cls,
        updates: Iterable[ClientUpdate],
        context: MergeContext,
        method: str,
        patterns: Sequence[str] = (),
        alpha: float | None = None,
        rank_stabilized: bool = False,
    ) -> PairUpdates:
        """Read all updates, and find the pairs in them.

        Raises
        ------
        AdapterError
            There are no pairs.
        """
        read = tuple(updates)
        pairs = find_pairs(read[0].state, patterns) if read else ()
        if read and not pairs:
            raise AdapterError(
                f"{method} merges low-rank pairs, and clients train none here: put adapters beside layers "
                '(model.lora, fedmerge.adapters.lora, or peft), or name your own pairs, pairs=["*.down:*.up"]; '
                "to merge whole models take another method, such as fedavg"
            )
        return cls(read, pairs, context, method, tuple(patterns), alpha, rank_stabilized)

    @cached_property
    def shares(self) -> list[float]:
        """p_i."""
        whole = sum(update.weight for update in self.updates)
        return [update.weight / whole for update in self.updates]

    def means(self) -> dict[str, Tensor]:
        """Weighted means of all parameters that are in no pair."""
        factors, total = {name for pair in self.pairs for name in (pair.a, pair.b)}, WeightedSum()
        for update in self.updates:
            total.add({name: t for name, t in update.state.items() if name not in factors}, update.weight)
        return total.mean()

    def rank(self, pair: Pair) -> int:
        """The rank that the server's pair has."""
        return pair.rank(self.updates[0].state)

    def own_ranks(self, pair: Pair) -> list[int]:
        """The rank that each client holds of it."""
        return [rank_of(*pair.factors(update.state)) for update in self.updates]

    def terms(self, pair: Pair) -> list[Term]:
        """``p_i B_i A_i`` of every client, whose sum the exact methods give."""
        terms = []
        for update, share, unit in zip(self.updates, self.shares, self.units(pair), strict=True):
            b, a = pair.factors(update.state)
            terms.append(Term(b if unit == 1 else b * unit, a, share))
        return terms

    def start(self, pair: Pair) -> Term | None:
        """The pair that was sent out; None where there is no base."""
        base = self.context.base
        return None if base is None else Term(*pair.factors(base))

    def units(self, pair: Pair) -> list[float]:
        """``s_i / s``: by what each client's B is to be multiplied.

        Raises
        ------
        InvalidOption
            Some tell a scaling, and nobody tells that of the server's model or of the other clients.
        """
        sent = [self._told(update, pair) for update in self.updates]
        if all(one is None for one in sent) and self.alpha is None:
            return [1.0] * len(sent)
        server = self._server(pair)
        if server is None:
            if len(set(sent)) > 1:
                raise InvalidOption(
                    f"{self.method}: the clients' scalings of {pair.a!r} are {sent}, and nobody tells that of the "
                    "server's model: pass model_fn=, or alpha="
                )
            return [1.0] * len(sent)
        known = [
            self._by_alpha(update, pair) if one is None else one for one, update in zip(sent, self.updates, strict=True)
        ]
        return [1.0 if one is None else one / server for one in known]

    def scaling(self, pair: Pair) -> float:
        """s, the scaling of the server's model, for methods that add updates to the layers' own weights.

        Raises
        ------
        InvalidOption
            Nobody tells it.
        """
        server = self._server(pair)
        sent = {self._told(update, pair) for update in self.updates}
        if server is None and len(sent) == 1:
            server = sent.pop()
        if server is None:
            raise InvalidOption(
                f"{self.method} adds updates to the weights of {pair.layer!r}, and nobody tells their scaling: pass "
                "model_fn= with layers that have one, as peft's have, or alpha="
            )
        return server

    def _told(self, update: ClientUpdate, pair: Pair) -> float | None:
        value = update.statistics.get("adapter_scaling", {}).get(pair.a)
        return None if value is None else float(value)

    def _server(self, pair: Pair) -> float | None:
        if self.alpha is not None:
            return pair_scaling(self.rank(pair), self.alpha, self.rank_stabilized)
        return None if self._model is None else scaling_of(self._model, pair)

    def _by_alpha(self, update: ClientUpdate, pair: Pair) -> float | None:
        if self.alpha is None:
            return None
        return pair_scaling(max(rank_of(*pair.factors(update.state)), 1), self.alpha, self.rank_stabilized)

    @cached_property
    def _model(self) -> nn.Module | None:
        return None if self.context.model_fn is None else self.context.model_fn()
