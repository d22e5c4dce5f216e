"""Checks of shapes and options that several models share: each returns the clean value or raises."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

from fedmerge.errors import InvalidOption, ModelError

__all__ = ["Widths", "choice", "flag", "fraction", "image", "whole", "widths"]

# Layer widths as a caller may write them: one number, or a list (TOML, command line) or tuple of them.
Widths = int | Sequence[int]


def image(model: str, input_shape: tuple[int, ...], smallest: int, why: str) -> tuple[int, int, int]:
    """Channels, height and width of an image input.

    Raises
    ------
    ModelError
        The input is no image, or one of its sides has fewer than `smallest` pixels.

    Examples
    --------
    >>> image("lenet", (1, 28, 28), 4, "it pools twice")
    (1, 28, 28)
    """
    wanted = f"model {model!r} wants images of shape (channels, height, width)"
    if len(input_shape) != 3:
        raise ModelError(
            f"{wanted}, the input shape given is {input_shape}. "
            "Add the missing channel axis (1 for grey images), or choose 'mlp', which takes any shape."
        )
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise ModelError(
            f"{wanted} of at least {smallest}x{smallest} pixels, because {why}; "
            f"the images given have {height}x{width}. Enlarge them, or choose a smaller model."
        )
    return channels, height, width


def whole(model: str, option: str, value: object, *, smallest: int = 1) -> int:
    """A whole number of at least `smallest`; a bool is refused, since ``hidden=True`` is a slip.

    Raises
    ------
    InvalidOption
        The value is no such number.

    Examples
    --------
    >>> whole("vit", "depth", 4)
    4
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise InvalidOption(
            f"option {option!r} of model {model!r} must be a whole number of at least {smallest}, not {value!r}."
        )
    return int(value)


def widths(model: str, option: str, value: object, *, count: int | None = None) -> tuple[int, ...]:
    """Layer widths as a tuple of positive numbers; `count` fixes how many layers there are.

    Raises
    ------
    InvalidOption
        A width is no positive whole number, or there are not `count` of them.

    Examples
    --------
    >>> widths("mlp", "hidden", [64, 32]), widths("mlp", "hidden", 100)
    ((64, 32), (100,))
    """
    many = value if isinstance(value, list | tuple) else (value,)
    if count is not None and len(many) != count:
        raise InvalidOption(
            f"option {option!r} of model {model!r} needs {count} widths, one a layer; {value!r} has {len(many)}."
        )
    return tuple(whole(model, option, width) for width in many)


def flag(model: str, option: str, value: object) -> bool:
    """True or False, nothing else: the string ``"false"`` would count as true.

    Raises
    ------
    InvalidOption
        The value is no bool.

    Examples
    --------
    >>> flag("mlp", "bias", False)
    False
    """
    if not isinstance(value, bool):
        raise InvalidOption(f"option {option!r} of model {model!r} must be true or false, not {value!r}.")
    return value


def fraction(model: str, option: str, value: object) -> float:
    """A share of at least 0 and below 1.

    Raises
    ------
    InvalidOption
        The value is no number, or lies outside.

    Examples
    --------
    >>> fraction("vgg9", "dropout", 0.1)
    0.1
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise InvalidOption(f"option {option!r} of model {model!r} must lie in [0, 1), not {value!r}.")
    return float(value)


def choice(model: str, option: str, value: object, allowed: Sequence[str]) -> str:
    """One of a few words.

    Raises
    ------
    InvalidOption
        The value is none of them.

    Examples
    --------
    >>> choice("resnet8", "norm", "group", ("batch", "group"))
    'group'
    """
    if not isinstance(value, str) or value not in allowed:
        words = " or ".join(repr(word) for word in allowed)
        raise InvalidOption(f"option {option!r} of model {model!r} must be {words}, not {value!r}.")
    return value
