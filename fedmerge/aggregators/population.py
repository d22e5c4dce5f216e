"""How many clients a federation has, for methods that go by all of them and not by those of a round."""

from __future__ import annotations

from typing import Protocol

from fedmerge.errors import InvalidOption
from fedmerge.update import MergeContext

__all__ = ["check_population", "population_of"]


class _Counting(Protocol):
    @property
    def population(self) -> int | None: ...


def check_population(method: _Counting) -> None:
    """Refuse a number of clients that is none.

    Raises
    ------
    InvalidOption
        It is not at least 1.
    """
    if method.population is not None and method.population < 1:
        raise InvalidOption(f"{type(method).__name__}: population must be at least 1, got {method.population}")


def population_of(method: _Counting, context: MergeContext, taken: int) -> int:
    """How many clients there are: as the method's option says, or else as the server knows; those of a round at least.

    Raises
    ------
    InvalidOption
        Nobody says.
    """
    population = context.population if method.population is None else method.population
    if population is None:
        raise InvalidOption(
            f"{type(method).__name__} goes by the number of all clients, which is not known: pass population="
        )
    return max(population, taken)
