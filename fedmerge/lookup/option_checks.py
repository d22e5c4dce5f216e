"""Checks of options that many methods share."""

from __future__ import annotations

from collections.abc import Collection

from fedmerge.errors import InvalidOption

__all__ = ["check_count", "check_form", "check_range", "check_word"]


def check_range(
    owner: object, name: str, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Check that option `name` of a dataclass lies in [low, high]; an open end is not in it.

    Raises
    ------
    InvalidOption
        It does not.
    """
    value = getattr(owner, name)
    above = low < value if open_low else low <= value
    if not (above and (value < high if open_high else value <= high)):
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise InvalidOption(f"{type(owner).__name__}: {name} must lie in {left}{low:g}, {high:g}{right}, got {value!r}")


def check_count(owner: object, name: str, least: int) -> None:
    """Check that option `name` of a dataclass is a whole number of at least `least`.

    Raises
    ------
    InvalidOption
        It is not.
    """
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidOption(f"{type(owner).__name__}: {name} must be a whole number of at least {least}, got {value!r}")


def check_word(owner: object, name: str, words: Collection[str]) -> None:
    """Check that option `name` of a dataclass is one of `words`.

    Raises
    ------
    InvalidOption
        It is not.
    """
    value = getattr(owner, name)
    if value not in words:
        raise InvalidOption(f"{type(owner).__name__}: {name} must be one of {', '.join(words)}, got {value!r}")


def check_form(owner: object, form: str) -> None:
    """Check that `form` is ``"paper"`` or ``"flower"``: whose form of a method that Flower has too.

    Raises
    ------
    InvalidOption
        It is neither.
    """
    if form not in ("paper", "flower"):
        raise InvalidOption(f'{type(owner).__name__}: form must be "paper" or "flower", got {form!r}')
