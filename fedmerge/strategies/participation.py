"""How many nodes take part: a strategy's fractions and minima, checked when it is made and when a run begins."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from flwr.serverapp import Grid

from fedmerge.errors import InvalidOption, shown

__all__ = [
    "MINIMA",
    "check_nodes",
    "check_participation",
    "number_of_nodes",
    "remedy",
    "shortage",
]

FRACTIONS = ("fraction_train", "fraction_evaluate")
MINIMA = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")


def check_participation(settings: Mapping[str, object]) -> None:
    """Check the fractions, minima and seed among a strategy's settings.

    Raises
    ------
    InvalidOption
        A fraction is no number in [0, 1], or a minimum or the seed no integer of at least 0.

    Examples
    --------
    >>> check_participation({"fraction_train": 0.5, "min_train_nodes": 2})
    >>> check_participation({"fraction_train": 1.5})
    Traceback (most recent call last):
    ...
    fedmerge.errors.InvalidOption: fraction_train must be a share of the nodes, a number from 0 to 1, got 1.5
    """
    for name in FRACTIONS:
        value: Any = settings.get(name, 0.0)
        if not _is_real(value) or not 0 <= value <= 1:
            hint = f"; for a number of nodes there is min_{name[9:]}_nodes" if _counts(value) else ""
            raise InvalidOption(f"{name} must be a share of the nodes, a number from 0 to 1, got {shown(value)}{hint}")
    seed: Any = settings.get("seed", 0)
    if not _counts(seed, least=0):
        raise InvalidOption(f"seed must be an integer of at least 0, got {shown(seed)}")
    for name in MINIMA:
        value = settings.get(name, 0)
        if not _counts(value, least=0):
            raise InvalidOption(f"{name} must be a number of nodes, an integer of at least 0, got {shown(value)}")


def _counts(value: Any, least: int = 2) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def shortage(known: int, settings: Mapping[str, Any], kinds: tuple[str, ...] = ("train", "evaluate")) -> str | None:
    """Which settings ask for more nodes than the `known` ones, in words; None where there are enough.

    Examples
    --------
    >>> shortage(4, {"fraction_train": 1.0, "min_train_nodes": 8, "min_available_nodes": 2})
    'min_train_nodes=8'
    >>> shortage(1, {"min_train_nodes": 2, "min_evaluate_nodes": 0, "min_available_nodes": 2})
    'min_train_nodes=2, min_available_nodes=2'
    """
    found = {f"min_{kind}_nodes": settings.get(f"min_{kind}_nodes", 0) for kind in kinds}
    found["min_available_nodes"] = settings.get("min_available_nodes", 0)
    told = [f"{name}={least}" for name, least in found.items() if _counts(least) and least > known]
    for kind in kinds:
        name = f"fraction_{kind}"
        fraction = settings.get(name, 0.0)
        if _is_real(fraction) and int(known * fraction) > known:
            told.append(f"{name}={fraction:g}")
    return ", ".join(told) or None


def check_nodes(grid: Grid, settings: Mapping[str, Any]) -> None:
    """Make sure that a federation of which the number of nodes is known for good has enough of them.

    Raises
    ------
    InvalidOption
        It has fewer than `settings` ask for, and waiting would have no end.
    """
    most = getattr(grid, "most_nodes", None)
    if isinstance(most, int):
        kinds = tuple(kind for kind in ("train", "evaluate") if settings[f"fraction_{kind}"])
        missing = shortage(most, settings, kinds)
        if missing is not None:
            raise InvalidOption(remedy(most, missing))


def number_of_nodes(grid: Grid) -> int:
    """How many nodes there are: all there will ever be, where that is known, or else those that are connected."""
    most = getattr(grid, "most_nodes", None)
    return most if isinstance(most, int) else len(list(grid.get_node_ids()))


def remedy(most: int, missing: str) -> str:
    """What is wrong with settings that a federation of `most` nodes cannot meet, and what to do."""
    nodes = "1 node" if most == 1 else f"{most} nodes"
    return (
        f"this federation has {nodes}, and no more will come, but the strategy waits for more: {missing}. "
        f"Lower these settings to at most {most} (fractions to at most 1), or simulate more clients"
    )
