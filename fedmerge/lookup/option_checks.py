"""Checks of options that many methods share."""

from __future__ import annotations

from fedmerge.errors import InvalidOption

__all__ = ["check_form", "check_range"]


def check_range(owner: object, name: str, low: float, high: float, *, open_high: bool = False) -> None:
    """Check that hyper-parameter `name` of a dataclass lies in [low, high], or in [low, high).

    Raises
    ------
    InvalidOption
        It does not.
    """
    value = getattr(owner, name)
    if not (low <= value < high if open_high else low <= value <= high):
        bracket = ")" if open_high else "]"
        raise InvalidOption(f"{type(owner).__name__}: {name} must lie in [{low:g}, {high:g}{bracket}, got {value!r}")


def check_form(owner: object, form: str) -> None:
    """Check that `form` is ``"paper"`` or ``"flower"``: whose form of a method that Flower has too.

    Raises
    ------
    InvalidOption
        It is neither.
    """
    if form not in ("paper", "flower"):
        raise InvalidOption(f'{type(owner).__name__}: form must be "paper" or "flower", got {form!r}')
