"""Pipelines by the names of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from typing import Any

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.searched import Searched
from fedmerge.errors import ConfigError, UnknownName
from fedmerge.lookup.kinds import METHOD_KINDS
from fedmerge.lookup.method_names import Part, parse_method
from fedmerge.merging.pipeline import Pipeline
from fedmerge.refine.searching import Searching
from fedmerge.registry import build, entries, usual_names

__all__ = ["build_pipeline", "divided", "main_part", "method_parts", "parts_beside"]


def build_pipeline(method: str, options: Mapping[str, Mapping[str, Any]] | None = None, **settings: Any) -> Pipeline:
    """Make a pipeline from a method's name, such as ``"fedavg"`` or ``"fednova+server_adam"``.

    Parameters
    ----------
    method
        In the order in which they happen, joined by ``+``: any edits of client updates; an aggregator, by name or one's
        own as ``module:Aggregator``; any server steps, refinements and trajectories. Options may stand behind each in
        parentheses, as in ``"dare(density=0.2)+fedfisher(variant=diag)+ridge_head"``.
    options
        Hyper-parameters by part, which those in parentheses override:
        ``{"fednova": {"tau_eff": "mean_steps"}, "server_adam": {"learning_rate": 0.1}}``.
    settings
        Further fields of :class:`Pipeline`.

    Raises
    ------
    UnknownName
        A part, or an option of one, that does not exist.
    InvalidOption
        An option with a wrong value.
    ConfigError
        ``module:Aggregator`` cannot be imported, or is none.

    Examples
    --------
    >>> build_pipeline("fedavg+server_momentum").server_steps
    (ServerMomentum(momentum=0.9, learning_rate=1.0),)
    """
    options = options or {}
    edits, first, others = divided(method_parts(method, options), method)
    aggregator = build("aggregator", first.name, first.options)
    if not isinstance(aggregator, Aggregator):  # somebody's own
        raise ConfigError(f"{first.name!r} is no fedmerge.aggregators.Aggregator but a {type(aggregator).__name__}")
    if aggregator.refined_by:
        own = [_with_options(part, options) for part in parse_method(aggregator.refined_by)]
        others = [*own, *others]
    beside = parts_beside(edits, others, method)
    searching = (Searching(aggregator),) if isinstance(aggregator, Searched) and aggregator.evaluations else ()
    return Pipeline(
        aggregator,
        beside["server step"],
        refinements=(*searching, *beside["refinement"]),
        edits=beside["edit"],
        trajectories=beside["trajectory"],
        **settings,
    )


def parts_beside(edits: Sequence[Part], others: Sequence[Part], method: str) -> dict[str, tuple[Any, ...]]:
    """What stands before and behind an aggregator, made, by its kind.

    Raises
    ------
    UnknownName, InvalidOption
        As :func:`build_pipeline`.
    """
    made: dict[str, list[Any]] = {"server step": [], "refinement": [], "trajectory": []}
    known = {name: kind for kind in made for name in entries(kind)}
    _check_order([part.name for part in others if part.name in known], known, method)
    for part in others:
        if part.name not in known:
            raise UnknownName("server step, refinement or trajectory", part.name, known, _place_of(part.name, method))
        kind = known[part.name]
        made[kind].append(build(kind, part.name, part.options))
    made["edit"] = [build("edit", part.name, part.options) for part in edits]
    return {kind: tuple(parts) for kind, parts in made.items()}


def divided(parts: Sequence[Part], method: str) -> tuple[list[Part], Part, list[Part]]:
    """The edits that a method begins with, its aggregator, and what stands behind.

    Raises
    ------
    ConfigError
        It has edits only.
    UnknownName
        What stands in front of its aggregator is nothing that there is.
    """
    known = entries("edit")
    edits = list(takewhile(lambda part: part.name in known, parts))
    if len(edits) == len(parts):
        raise ConfigError(
            f"method {method!r} edits updates and does not merge them: put an aggregator behind, as in {method}+fedavg"
        )
    first, others = parts[len(edits)], list(parts[len(edits) + 1 :])
    if ":" not in first.name and any(_merges(part.name) for part in others) and not _is_known(first.name):
        raise UnknownName("edit", first.name, known, f"In {method!r}.")
    return edits, first, others


def _merges(name: str) -> bool:
    return name in entries("aggregator") or name in usual_names()


def _is_known(name: str) -> bool:
    return name in usual_names() or any(name in entries(kind) for kind in METHOD_KINDS)


def _check_order(names: Sequence[str], kinds: Mapping[str, str], method: str) -> None:
    """Refuse a method whose parts are not written in the order in which they happen."""
    for first, then in pairwise(names):
        if METHOD_KINDS.index(kinds[first]) > METHOD_KINDS.index(kinds[then]):
            raise ConfigError(
                f"method {method!r}: {then} is a {kinds[then]} and happens before {first}, a {kinds[first]}: "
                f"write +{then} in front of +{first}"
            )


def main_part(method: str) -> Part:
    """The aggregator of a method, with the options that stand behind its name.

    Examples
    --------
    >>> main_part("trim+fedatt(step_size=1)+server_momentum")
    Part(name='fedatt', options={'step_size': 1})
    """
    return divided(parse_method(method), method)[1]


def _place_of(name: str, method: str) -> str:
    if name in entries("edit"):
        return f"{name} edits updates before they are merged, so it stands in front: {name}+..."
    if name in entries("aggregator"):
        return f"{method!r} has an aggregator already, and a method has one."
    return f"In {method!r}."


def method_parts(method: str, options: Mapping[str, Mapping[str, Any]]) -> list[Part]:
    """The parts of a method with all their options; one that goes by its usual name becomes what that stands for.

    Examples
    --------
    >>> method_parts("fedadam(tau=0.1)", {"fedadam": {"beta1": 0.5}})
    [Part(name='fedavg', options={}), Part(name='server_adam', options={'beta1': 0.5, 'tau': 0.1})]
    """
    edits, first, others = divided(parse_method(method), method)
    step = usual_names().get(first.name)
    main = [first] if step is None else [Part("fedavg", {}), Part(step, _with_options(first, options).options)]
    return [_with_options(part, options) for part in (*edits, *main, *others)]


def _with_options(part: Part, options: Mapping[str, Mapping[str, Any]]) -> Part:
    return Part(part.name, {**options.get(part.name, {}), **part.options})
