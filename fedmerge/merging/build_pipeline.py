"""Pipelines by the names of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.searched import Searched
from fedmerge.errors import ConfigError
from fedmerge.lookup.method_names import Part, names_code, parse_method
from fedmerge.merging.method_order import check_order, divided, kinds_behind, method_parts, with_options
from fedmerge.merging.pipeline import Pipeline
from fedmerge.refine.searching import Searching
from fedmerge.registry import build

__all__ = ["build_pipeline", "parts_beside"]


def build_pipeline(
    method: str, options: Mapping[str, Mapping[str, Any]] | None = None, *, load: bool = True, **settings: Any
) -> Pipeline:
    """Make a pipeline from a method's name, such as ``"fedavg"`` or ``"fednova+server_adam"``.

    Parameters
    ----------
    method
        In the order in which they happen, joined by ``+``: any edits of client updates; an aggregator; any server
        steps, refinements and trajectories. Each goes by its name, or one's own as ``module:name``. Options may stand
        behind each in parentheses, as in ``"dare(density=0.2)+fedfisher(variant=diag)+mine:Step(rate=0.5)"``.
    options
        Hyper-parameters by part, which those in parentheses override:
        ``{"fednova": {"tau_eff": "mean_steps"}, "server_adam": {"learning_rate": 0.1}}``.
    load
        Whether to import what goes by ``module:name``; without, such edits, such parts behind the aggregator and
        options of it that name such are left out, to check the others.
    settings
        Further fields of :class:`Pipeline`.

    Raises
    ------
    UnknownName
        A part, or an option of one, that does not exist.
    InvalidOption
        An option with a wrong value.
    ConfigError
        ``module:name`` cannot be imported, or is nothing that may stand there.

    Examples
    --------
    >>> build_pipeline("fedavg+server_momentum").server_steps
    (ServerMomentum(momentum=0.9, learning_rate=1.0),)
    """
    options = options or {}
    edits, first, others = divided(method_parts(method, options, load=load), method, load=load)
    known = {name: value for name, value in first.options.items() if load or not names_code(value)}
    aggregator = build("aggregator", first.name, known)
    if not isinstance(aggregator, Aggregator):  # somebody's own
        raise ConfigError(f"{first.name!r} is no fedmerge.aggregators.Aggregator but a {type(aggregator).__name__}")
    if aggregator.refined_by:
        own = [with_options(part, options) for part in parse_method(aggregator.refined_by)]
        others = [*own, *others]
    beside = parts_beside(edits, others, method, load=load)
    searching = (Searching(aggregator),) if isinstance(aggregator, Searched) and aggregator.evaluations else ()
    return Pipeline(
        aggregator,
        beside["server step"],
        refinements=(*searching, *beside["refinement"]),
        edits=beside["edit"],
        trajectories=beside["trajectory"],
        **settings,
    )


def parts_beside(
    edits: Sequence[Part], others: Sequence[Part], method: str, *, load: bool = True
) -> dict[str, tuple[Any, ...]]:
    """What stands before and behind an aggregator, made, by its kind; without `load` nothing of one's own.

    Raises
    ------
    UnknownName, InvalidOption, ConfigError
        As :func:`build_pipeline`.
    """
    kinds = kinds_behind(others, method, load=load)
    behind = [part for part in others if part.name in kinds]
    check_order([part.name for part in behind], kinds, method)
    made: dict[str, list[Any]] = {"server step": [], "refinement": [], "trajectory": []}
    for part in behind:
        made[kinds[part.name]].append(build(kinds[part.name], part.name, part.options))
    made["edit"] = [build("edit", part.name, part.options) for part in edits if load or ":" not in part.name]
    return {kind: tuple(parts) for kind, parts in made.items()}
