"""Pipelines by the names of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.errors import ConfigError, UnknownName
from fedmerge.lookup.method_names import Part, parse_method
from fedmerge.merging.pipeline import Pipeline
from fedmerge.registry import build, entries, usual_names

__all__ = ["build_pipeline", "method_parts"]


def build_pipeline(method: str, options: Mapping[str, Mapping[str, Any]] | None = None, **settings: Any) -> Pipeline:
    """Make a pipeline from a method's name, such as ``"fedavg"`` or ``"fednova+server_adam"``.

    Parameters
    ----------
    method
        An aggregator, by name or one's own as ``module:Aggregator``, then any server steps and refinements, joined by
        ``+``; options may stand behind each in parentheses, as in ``"fedfisher(variant=diag)+ridge_head"``.
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
    first, *others = method_parts(method, options)
    aggregator = build("aggregator", first.name, first.options)
    if not isinstance(aggregator, Aggregator):  # somebody's own
        raise ConfigError(f"{first.name!r} is no fedmerge.aggregators.Aggregator but a {type(aggregator).__name__}")
    if aggregator.refined_by:
        own = [_with_options(part, options) for part in parse_method(aggregator.refined_by)]
        others = [*own, *others]
    made: dict[str, list[Any]] = {"server step": [], "refinement": []}
    known = {name: kind for kind in made for name in entries(kind)}
    for part in others:
        if part.name not in known:
            raise UnknownName("server step or refinement", part.name, known, f"In {method!r}.")
        kind = known[part.name]
        made[kind].append(build(kind, part.name, part.options))
    refinements = tuple(made["refinement"])
    return Pipeline(aggregator, tuple(made["server step"]), refinements=refinements, **settings)


def method_parts(method: str, options: Mapping[str, Mapping[str, Any]]) -> list[Part]:
    """The parts of a method with all their options; one that goes by its usual name becomes what that stands for.

    Examples
    --------
    >>> method_parts("fedadam(tau=0.1)", {"fedadam": {"beta1": 0.5}})
    [Part(name='fedavg', options={}), Part(name='server_adam', options={'beta1': 0.5, 'tau': 0.1})]
    """
    first, *others = parse_method(method)
    step = usual_names().get(first.name)
    if step is not None:
        own = _with_options(first, options).options
        return [
            _with_options(Part("fedavg", {}), options),
            _with_options(Part(step, own), options),
            *(_with_options(part, options) for part in others),
        ]
    return [_with_options(part, options) for part in (first, *others)]


def _with_options(part: Part, options: Mapping[str, Mapping[str, Any]]) -> Part:
    return Part(part.name, {**options.get(part.name, {}), **part.options})
