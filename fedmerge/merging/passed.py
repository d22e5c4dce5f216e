"""Other models than the merge itself that refinements may start from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fedmerge.state import State, WeightedSum
from fedmerge.update import ClientUpdate

__all__ = ["Passed"]


@dataclass
class Passed:
    """What updates leave behind as they pass: often a better start for what follows than what is made of them."""

    mean: WeightedSum = field(default_factory=WeightedSum)
    largest: ClientUpdate | None = None
    kept: list[ClientUpdate] = field(default_factory=list)

    def by(self, updates: Iterable[ClientUpdate], alone: bool) -> Iterator[ClientUpdate]:
        """The updates; the largest client's is kept where it may stand `alone`."""
        for update in updates:
            self.mean.add(update.state, update.weight)
            if alone and (self.largest is None or update.weight > self.largest.weight):
                self.largest = update
            yield update

    def keeping(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """The updates, which all are kept for what searches among them."""
        for update in updates:
            self.kept.append(update)
            yield update

    def models(self) -> list[State]:
        """Their mean, and the largest client's; none where all were kept."""
        if self.kept:  # a search has its own start
            return []
        found: list[State] = [self.mean.mean()] if self.mean.weight else []
        return found if self.largest is None else [*found, self.largest.state]
