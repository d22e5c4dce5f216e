"""How a method is written: ``fedavg``, ``fednova+server_adam``, ``fedfisher(variant=diag)``.

This is no Python, and so not for ``ast``: names hold colons and hyphens, values are TOML's (``true``, ``1e-3``) or text
without quotes (``kfac``, a path, another method).
"""

from __future__ import annotations

import re
import tomllib
from typing import Any, NamedTuple

from fedmerge.errors import InvalidOption

__all__ = ["Part", "names_code", "own_parts", "parse_method", "parse_value", "split_methods"]

_CODE = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*(\(.*\))?")
_PART = re.compile(r"(?P<name>[^()=,+]+)(?:\((?P<options>.*)\))?")


class Part(NamedTuple):
    """An edit, an aggregator, a server step or a refinement, and the options written behind its name."""

    name: str
    options: dict[str, Any]


def parse_method(method: str) -> list[Part]:
    """The parts of a method, joined by ``+``, each with its options in parentheses.

    Raises
    ------
    InvalidOption
        It is not written so.

    Examples
    --------
    >>> parse_method("fednova+server_adam(learning_rate=0.1)")[1]
    Part(name='server_adam', options={'learning_rate': 0.1})
    >>> parse_method("rebasin(combine=trimmed_mean(trim=0.1))")[0].options
    {'combine': 'trimmed_mean(trim=0.1)'}
    """
    return [_part(text, method) for text in _split(method, "+")]


def names_code(option: object) -> bool:
    """Whether the value of an option is a part of one's own, ``module:name``, options behind it or not.

    Examples
    --------
    >>> [names_code(value) for value in ("mine:Mean(rate=0.5)", "median", "C:/bases/vit.safetensors", 3)]
    [True, False, False, False]
    """
    return isinstance(option, str) and _CODE.fullmatch(option.strip()) is not None


def own_parts(method: str) -> list[Part]:
    """The parts of a method that go by ``module:name``, with the options behind them, and those that options name.

    One of them may be a whole Flower strategy, which nothing stands beside.

    Examples
    --------
    >>> own_parts("dare+mine:Mean(rate=0.5)+mine:Step")
    [Part(name='mine:Mean', options={'rate': 0.5}), Part(name='mine:Step', options={})]
    >>> own_parts("rebasin(combine=mine:Mean)")
    [Part(name='mine:Mean', options={})]
    """
    if ":" not in method:
        return []
    parts = parse_method(method)
    named = [value for part in parts for value in part.options.values() if names_code(value)]
    return [part for part in parts if ":" in part.name] + [part for value in named for part in own_parts(value)]


def split_methods(text: str) -> list[str]:
    """Methods written in a row, separated by commas outside of parentheses.

    Examples
    --------
    >>> split_methods("fedavg, fedfisher(variant=diag,damping=0.1)")
    ['fedavg', 'fedfisher(variant=diag,damping=0.1)']
    """
    return [method.strip() for method in _split(text, ",") if method.strip()]


def parse_value(text: str) -> Any:
    """A value as TOML writes it, or else the text itself.

    Examples
    --------
    >>> parse_value("0.5"), parse_value("true"), parse_value("kfac")
    (0.5, True, 'kfac')
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _split(text: str, separator: str) -> list[str]:
    """Split at separators that stand in no brackets and no quotes."""
    pieces, depth, quote = [""], 0, ""
    for character in text:
        if quote or character in "\"'":
            quote = "" if character == quote else quote or character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0 and not quote:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def _part(text: str, method: str) -> Part:
    if not text.strip():
        raise InvalidOption(f"method {method!r} lacks a name beside a +: write it as in fedavg+server_adam")
    match = _PART.fullmatch(text.strip())
    if match is None or not _balanced(match["options"] or ""):
        raise InvalidOption(f"cannot read {text!r} of method {method!r}: want name, or name(option=value,...)")
    options: dict[str, Any] = {}
    for item in filter(None, _split(match["options"] or "", ",")):
        key, equals, value = item.partition("=")
        if not equals or not key.strip().isidentifier():
            raise InvalidOption(f"cannot read {item!r} of method {method!r}: want option=value")
        options[key.strip()] = parse_value(value.strip())
    return Part(match["name"].strip(), options)


def _balanced(text: str) -> bool:
    """Whether every parenthesis in `text` has its other half."""
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return False
    return depth == 0
