"""Keywords of a strategy: read, and checked against what it and its method know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from fedmerge.errors import InvalidOption, UnknownName
from fedmerge.merging import Pipeline, main_part, options_elsewhere
from fedmerge.registry import entry, usual_names
from fedmerge.statistics import StatisticsSettings
from fedmerge.strategies.travel import Travel
from fedmerge.update import MergeContext

__all__ = ["check_keywords", "check_server", "statistics_settings"]

# Keywords of Flower's older strategies (flwr.server), by their names of today.
_RENAMED = {
    "evaluate_metrics_aggregation_fn": "evaluate_metrics_aggr_fn",
    "fit_metrics_aggregation_fn": "train_metrics_aggr_fn",
    "fraction_fit": "fraction_train",
    "min_available_clients": "min_available_nodes",
    "min_evaluate_clients": "min_evaluate_nodes",
    "min_fit_clients": "min_train_nodes",
}
_START = {
    "evaluate_fn": "evaluate_fn",
    "initial_arrays": "initial_arrays",
    "initial_parameters": "initial_arrays",
    "num_rounds": "num_rounds",
    "on_evaluate_config_fn": "evaluate_config",
    "on_fit_config_fn": "train_config",
}


def statistics_settings(given: StatisticsSettings | Mapping[str, Any] | None) -> StatisticsSettings:
    """Read settings of statistics, be they a mapping.

    Raises
    ------
    UnknownName
        A setting that does not exist.
    """
    if given is None or isinstance(given, StatisticsSettings):
        return given or StatisticsSettings()
    known = [field.name for field in dataclasses.fields(StatisticsSettings)]
    for name in given:
        if name not in known:
            raise UnknownName("setting of statistics", name, known)
    return StatisticsSettings(**given)


def check_keywords(method: str, options: dict[str, Any], strategy: type) -> None:
    """Name the nearest keyword for a misspelt one, be it Flower's or the method's."""
    first = main_part(method).name
    step = usual_names().get(first)
    own = (entry("aggregator", first) if step is None else entry("server step", step)).options
    flower = vars(strategy)["__init__"].__kwdefaults__ or {}
    for name in options:
        if name not in own:
            guess = _RENAMED.get(name)
            elsewhere = options_elsewhere(method, name)
            remedy = f"It goes into start({_START[name]}=...)." if name in _START else elsewhere
            raise UnknownName(f"keyword of strategy {method!r}", name, [*own, *flower], remedy, guess)


def check_server(pipeline: Pipeline, travel: Travel, data: Iterable[Any] | None, example: object) -> None:
    """Make sure that the server has what the method wants there.

    Raises
    ------
    InvalidOption
        It lacks something without which all the training would be in vain.
    """
    aggregator = pipeline.aggregator
    name, wanted = type(aggregator).__name__, aggregator.server_data
    if wanted != "none" and data is None:
        raise InvalidOption(f"{name} needs batches on the server: pass data= (server_examples in a configuration)")
    if wanted == "labels" and travel.layout is not None and travel.layout.personal:
        raise InvalidOption(
            f"{name} judges models on the server, and {travel.layout.personal[0]!r} is personal: only clients have a "
            "whole model. Take a method that needs no data on the server"
        )
    if aggregator.requires_model and travel.model_fn is None:
        raise InvalidOption(f"{name} has to know the model: pass model_fn=")
    if aggregator.requires_model and example is None and data is None:
        raise InvalidOption(f"{name} has to trace the model: pass example=, one batch of inputs")
    for one in pipeline.refinements:
        one.asks(MergeContext(data=data, model_fn=travel.model_fn, layout=travel.layout, ask=_nobody))


def _nobody(*_: Any, **__: Any) -> Any:
    """In the place of clients, who can be asked in a run."""
    raise NotImplementedError
