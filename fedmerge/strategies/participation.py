"""How many clients a strategy asks: its fractions and minima, checked when it is made and against a federation."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from fedmerge.errors import InvalidOption, shown

__all__ = ["MINIMA", "check_participation", "shortage", "wanted"]

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


def wanted(known: int, fraction: float, least: int, available: int) -> tuple[int, int]:
    """How many of the `known` nodes to ask, and how many there have to be before anybody is asked."""
    size = max(int(known * fraction), least)
    return size, max(available, size)


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
