"""One kind of hostile behaviour, and tables of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Kind", "Table", "table"]


@dataclass(frozen=True)
class Kind:
    """What a hostile client makes of the honest thing.

    Parameters
    ----------
    name
        In words.
    place
        Where it lies: ``state``, ``weight``, ``metrics``, ``statistic``, ``answer`` or ``identity``.
    make
        ``(rng, honest, about) -> hostile``, or None where there is nothing of the kind to spoil.
    must_drop
        Whether no honest client can have sent it, so that whoever did has to be left out. Otherwise it may be
        taken, for instance cast, or be left out: the round goes on in any case.
    wide
        Whether it is another width, which methods that merge unequal widths may take.
    lie
        Whether it is finite and of the right form, so that nothing but a robust method can tell it.
    """

    name: str
    place: str
    make: Callable[[random.Random, Any, Any], Any]
    must_drop: bool = True
    wide: bool = False
    lie: bool = False

    def __call__(self, rng: random.Random, honest: Any, about: Any) -> Any:
        """The hostile thing."""
        return self.make(rng, honest, about)

    def __str__(self) -> str:
        return f"{self.place}: {self.name}"


Table = dict[str, Kind]


def table(place: str, *entries: Kind) -> Table:
    """Kinds of one place by their names."""
    found = {one.name: replace(one, place=place) for one in entries}
    assert len(found) == len(entries), "two kinds with one name"
    return found
