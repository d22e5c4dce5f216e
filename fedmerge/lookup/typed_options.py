"""Options of a part, checked against the types of its parameters."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedmerge.errors import InvalidOption, UnknownName

__all__ = ["typed_options"]


def typed_options(name: str, made: Any, known: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the parameters' types want them: text such as ``"0.5"`` becomes a number.

    Parameters
    ----------
    name
        The part, for errors.
    made
        Its class or function.
    known
        Its options with their defaults; ``inspect.Parameter.empty`` for those that have to be given.
    options
        What is given.

    Raises
    ------
    UnknownName
        It has no such option.
    InvalidOption
        One of the wrong type, or one that is needed and not given.

    Examples
    --------
    >>> def flip(share: float) -> None: ...
    >>> typed_options("flip", flip, {"share": 0.5}, {"share": "0.25"})
    {'share': 0.25}
    """
    hints, checked = _hints(made), {}
    for key, value in options.items():
        if key not in known:
            raise UnknownName(f"option of {name}", key, known, "" if known else "It takes none.")
        try:
            adapter = TypeAdapter(hints.get(key, Any), config=ConfigDict(arbitrary_types_allowed=True))
            checked[key] = adapter.validate_python(value)
        except ValidationError as error:
            reasons = "; ".join(sorted({detail["msg"] for detail in error.errors()}))
            raise InvalidOption(f"{name}: option {key} = {value!r} is not valid: {reasons}") from error
    missing = [key for key, default in known.items() if default is inspect.Parameter.empty and key not in options]
    if missing:
        raise InvalidOption(f"{name} wants its option {missing[0]}: write {name}({missing[0]}=VALUE)")
    return checked


def _hints(made: Any) -> dict[str, Any]:
    """Types of the parameters, where they can be read."""
    plain_class = isinstance(made, type) and not dataclasses.is_dataclass(made)
    try:
        return get_type_hints(made.__init__ if plain_class else made)
    except Exception:  # of somebody else's code, whose annotations may name anything
        return {}
