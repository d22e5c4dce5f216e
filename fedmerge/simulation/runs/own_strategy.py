"""Strategies of others for a comparison, as ``module:Strategy(option=value)``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.errors import ConfigError, FedMergeError
from fedmerge.lookup.loading import load_named
from fedmerge.merging import build_pipeline, divided, method_parts
from fedmerge.strategies import MergeStrategy, RunSettings
from fedmerge.strategies.run_settings import AdoptsRun

__all__ = ["make_strategy"]


def make_strategy(
    method: str, keywords: Mapping[str, Any], run: RunSettings, options: Mapping[str, Mapping[str, Any]] | None = None
) -> Strategy:
    """Make any Flower strategy, and hand it the settings of the run where it is one of ours.

    Parameters
    ----------
    method
        As it is written: ``module:Strategy``, a class, or a function that makes a strategy; or ``module:Aggregator``,
        which a strategy of ours merges with, and which other parts may stand beside.
    keywords
        What a strategy is called with.
    run
        What a strategy with a method ``adopt(run)`` takes over, as those that derive from
        :class:`~fedmerge.strategies.MergeStrategy` have it; also where another is wrapped around it.
    options
        By part, for a strategy over `keywords`; those in parentheses go before them.

    Raises
    ------
    ConfigError
        It cannot be imported or made, or cannot honour a setting of the run.
    """
    options = options or {}
    edits, own, others = divided(method_parts(method, options), method)
    name = own.name
    module = name.partition(":")[0]
    make = load_named(name, "method", "Strategy", "my_strategies:Mine", ConfigError)
    if isinstance(make, type) and issubclass(make, Aggregator):
        ours = MergeStrategy(build_pipeline(method, options, privacy=run.privacy, trust=run.trust), **keywords)
        ours.adopt(run)
        return ours
    if edits or others:
        raise ConfigError(
            f"method {method!r}: {name!r} is no fedmerge.aggregators.Aggregator, and only with one do other parts go "
            f"by +: leave out {', '.join(part.name for part in (*edits, *others))}"
        )
    keywords = {**keywords, **own.options}
    if isinstance(make, type) and not issubclass(make, Strategy):
        older = " of flwr.server, which holds Flower's older ones" if module.startswith("flwr.server.") else ""
        raise ConfigError(f"method {name!r} is no flwr.serverapp.strategy.Strategy but a {make.__name__}{older}")
    try:
        strategy = make(**keywords)
    except FedMergeError as error:
        raise ConfigError(f"method {name!r}: {error}") from error
    except Exception as error:  # somebody else's constructor may raise anything
        raise ConfigError(
            f"method {name!r}: cannot make a Flower strategy of it with {dict(keywords)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"method {name!r} is no flwr.serverapp.strategy.Strategy but a {type(strategy).__name__}")
    adopting = list(_adopting(strategy))
    beyond = run.beyond_flower()
    if not adopting and beyond:
        raise ConfigError(
            f"method {name!r} is Flower's and knows nothing of {', '.join(beyond)}: leave it out of the configuration, "
            "or the method out of the comparison"
        )
    for one in adopting:
        try:
            one.adopt(run)
        except FedMergeError as error:
            raise ConfigError(f"method {name!r}: {error}") from error
    return strategy


def _adopting(strategy: Strategy) -> Iterator[AdoptsRun]:
    """The strategies that adopt the run: this one, or those that it is wrapped around."""
    if isinstance(strategy, AdoptsRun):
        yield strategy
        return
    for value in vars(strategy).values():
        if isinstance(value, Strategy):
            yield from _adopting(value)
