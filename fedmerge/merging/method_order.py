"""Which part of a method merges, what stands before it and what behind: by names, or by what one's own parts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from fedmerge.errors import ConfigError, UnknownName
from fedmerge.lookup.kinds import METHOD_KINDS
from fedmerge.lookup.method_names import Part, parse_method
from fedmerge.registry import entries, entry, own_kind, usual_names

__all__ = ["check_order", "divided", "kinds_behind", "main_part", "method_parts", "options_elsewhere", "with_options"]


def divided(parts: Sequence[Part], method: str, *, load: bool = True) -> tuple[list[Part], Part, list[Part]]:
    """The edits that a method begins with, its aggregator, and what stands behind.

    Parameters
    ----------
    parts
        Its parts.
    method
        As it is written, for errors.
    load
        Whether parts of one's own, ``module:name``, are imported to see what they are. Without, one counts as an edit
        if a registered edit or aggregator follows; of several that could be the aggregator, the first is taken for it.

    Raises
    ------
    ConfigError
        It has edits only; or a part of one's own cannot be imported, or is none that may stand there.
    UnknownName
        What stands in front of its aggregator is nothing that there is.
    """
    place = 0
    while place < len(parts) and _is_edit(parts, place, load=load):
        place += 1
    if place == len(parts):
        raise ConfigError(
            f"method {method!r} edits updates and does not merge them: put an aggregator behind, as in {method}+fedavg"
        )
    edits, first, others = list(parts[:place]), parts[place], list(parts[place + 1 :])
    if ":" not in first.name and any(_merges(part.name) for part in others) and not _is_known(first.name):
        raise UnknownName("edit", first.name, entries("edit"), f"In {method!r}.")
    if load and ":" in first.name and own_kind(first.name) in METHOD_KINDS[2:]:
        before = next((part.name for part in others if _merges(part.name)), "fedavg")
        raise ConfigError(
            f"method {method!r}: {first.name!r} is a {own_kind(first.name)}, which stands behind an aggregator: write "
            f"{before}+{first.name}"
        )
    return edits, first, others


def _is_edit(parts: Sequence[Part], place: int, *, load: bool) -> bool:
    name = parts[place].name
    if ":" not in name:
        return name in entries("edit")
    if load:
        return own_kind(name) == "edit"
    return any(_merges(part.name) or part.name in entries("edit") for part in parts[place + 1 :])


def _merges(name: str) -> bool:
    return name in entries("aggregator") or name in usual_names()


def _is_known(name: str) -> bool:
    return name in usual_names() or any(name in entries(kind) for kind in METHOD_KINDS)


def kinds_behind(others: Sequence[Part], method: str, *, load: bool = True) -> dict[str, str]:
    """The kind of each part behind an aggregator, by its name; without `load` none of one's own.

    Raises
    ------
    UnknownName, ConfigError
        One is none of the kinds that stand there.
    """
    known = {name: kind for kind in METHOD_KINDS[2:] for name in entries(kind)}
    kinds: dict[str, str] = {}
    for name in (part.name for part in others if load or ":" not in part.name):
        kind = own_kind(name) if ":" in name else known.get(name, "")
        if kind in METHOD_KINDS[2:]:
            kinds[name] = kind
        elif ":" in name and kind not in METHOD_KINDS:
            raise ConfigError(
                f"method {method!r}: {name!r} is no edit, server step, refinement or trajectory, which may stand "
                "beside an aggregator: derive its class from fedmerge's of that kind"
            )
        else:
            raise UnknownName("server step, refinement or trajectory", name, known, _place_of(name, kind, method))
    return kinds


def _place_of(name: str, kind: str, method: str) -> str:
    if kind == "edit" or name in entries("edit"):
        return f"{name} edits updates before they are merged, so it stands in front: {name}+..."
    if kind == "aggregator" or name in entries("aggregator"):
        return f"{method!r} has an aggregator already, and a method has one."
    return f"In {method!r}."


def check_order(names: Sequence[str], kinds: Mapping[str, str], method: str) -> None:
    """Refuse a method whose parts are not written in the order in which they happen."""
    for first, then in pairwise(names):
        if METHOD_KINDS.index(kinds[first]) > METHOD_KINDS.index(kinds[then]):
            raise ConfigError(
                f"method {method!r}: {then} is a {kinds[then]} and happens before {first}, a {kinds[first]}: "
                f"write +{then} in front of +{first}"
            )


def main_part(method: str, *, load: bool = True) -> Part:
    """The aggregator of a method, with the options that stand behind its name.

    Examples
    --------
    >>> main_part("trim+fedatt(step_size=1)+server_momentum")
    Part(name='fedatt', options={'step_size': 1})
    """
    return divided(parse_method(method), method, load=load)[1]


def method_parts(method: str, options: Mapping[str, Mapping[str, Any]], *, load: bool = True) -> list[Part]:
    """The parts of a method with all their options; one that goes by its usual name becomes what that stands for.

    Examples
    --------
    >>> method_parts("fedadam(tau=0.1)", {"fedadam": {"beta1": 0.5}})
    [Part(name='fedavg', options={}), Part(name='server_adam', options={'beta1': 0.5, 'tau': 0.1})]
    """
    edits, first, others = divided(parse_method(method), method, load=load)
    step = usual_names().get(first.name)
    main = [first] if step is None else [Part("fedavg", {}), Part(step, with_options(first, options).options)]
    return [with_options(part, options) for part in (*edits, *main, *others)]


def with_options(part: Part, options: Mapping[str, Mapping[str, Any]]) -> Part:
    """A part with its options of a table, which those in parentheses override."""
    return Part(part.name, {**options.get(part.name, {}), **part.options})


def options_elsewhere(method: str, option: str) -> str:
    """Where to write an option that the aggregator does not have and another part does; empty where none has it.

    Examples
    --------
    >>> options_elsewhere("dare+fedavg", "density")
    'Options of dare stand behind it: dare(density=...).'
    """
    edits, _, others = divided(parse_method(method), method)
    kinds = {**{part.name: "edit" for part in edits}, **kinds_behind(others, method)}
    holders = [name for name, kind in kinds.items() if option in entry(kind, name).options]
    return f"Options of {holders[0]} stand behind it: {holders[0]}({option}=...)." if holders else ""
