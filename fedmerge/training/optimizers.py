"""Optimisers of a client's local training: any of ``torch.optim``, by name and options."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch.optim import Optimizer

from fedmerge.errors import InvalidOption, UnknownName

__all__ = [
    "check_options",
    "default_decay",
    "optimizer_names",
    "optimizer_with",
    "options_table",
    "why_not_stacked",
]

_STACKED_OPTIONS: Mapping[str, frozenset[str]] = {
    "sgd": frozenset(),
    "adam": frozenset({"betas", "eps"}),
    "adamw": frozenset({"betas", "eps"}),
}
"""Optimisers of which one call takes a step of many clients, and the options with which it still does."""

# Settings of LocalTraining by their names in torch.
_SETTINGS = {"lr": "learning_rate", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}


@cache
def _classes() -> dict[str, type[Optimizer]]:
    classes = {name.lower(): kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    return {name: kind for name, kind in classes.items() if issubclass(kind, Optimizer) and kind is not Optimizer}


@cache
def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_classes()[name]).parameters


def optimizer_names() -> list[str]:
    """Names of the optimisers that a client may train with.

    Examples
    --------
    >>> {"sgd", "adamw", "rmsprop"} <= set(optimizer_names())
    True
    """
    return sorted(_classes().keys() - {"lbfgs"})


def default_decay(name: str) -> float:
    """The weight decay that an optimiser has where none is set.

    Examples
    --------
    >>> default_decay("sgd"), default_decay("adamw")
    (0.0, 0.01)
    """
    parameter = _parameters(name).get("weight_decay")
    return 0.0 if parameter is None else float(parameter.default)


def optimizer_with(
    name: str, options: Mapping[str, Any], learning_rate: float, momentum: float, weight_decay: float | None
) -> Callable[..., Optimizer]:
    """What makes a fresh optimiser of parameters, with these settings.

    Examples
    --------
    >>> optimizer_with("adam", {"betas": [0.9, 0.99]}, 0.1, 0.9, None).keywords
    {'lr': 0.1, 'betas': (0.9, 0.99)}
    """
    # torch wants tuples, and TOML and JSON know lists only.
    tuples = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    arguments: dict[str, Any] = {"lr": learning_rate, **tuples}
    if name == "sgd":
        arguments["momentum"] = momentum
    if weight_decay is not None:
        arguments["weight_decay"] = weight_decay
    return partial(_classes()[name], **arguments)


def why_not_stacked(name: str, options: Mapping[str, Any]) -> str | None:
    """Why one call cannot take this optimiser's step of many clients; None where it can."""
    if name not in _STACKED_OPTIONS:
        return f"optimizer {name} steps one client at a time"
    unknown = set(options) - _STACKED_OPTIONS[name]
    return f"optimizer {name} with {', '.join(sorted(unknown))} steps one client at a time" if unknown else None


def options_table(options: object) -> dict[str, Any]:
    """Options as a mapping: as they were given, or out of the JSON that a message brings.

    Raises
    ------
    InvalidOption
        They are no table.
    """
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError as error:
            raise InvalidOption(f"training.optimizer_options: cannot read {options!r} as JSON ({error})") from error
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise InvalidOption(f"training.optimizer_options must be a table of options, got {options!r}")
    return dict(options)


def check_options(name: str, options: Mapping[str, Any], weight_decay: float | None) -> None:
    """Make sure that there is such an optimiser, and that it has options of these names.

    Raises
    ------
    UnknownName
        There is no such optimiser, or no such option of it.
    InvalidOption
        It cannot train a client, or an option is a setting of its own.
    """
    if name not in optimizer_names():
        if name == "lbfgs":
            raise InvalidOption(
                "training.optimizer = 'lbfgs' computes the loss several times in a step, which local training does "
                "not: take another, or a training function of your own (training.train_fn)"
            )
        raise UnknownName("optimizer", name, optimizer_names())
    taken = _parameters(name).keys() - {"params"}
    settings = _SETTINGS | ({"momentum": "momentum"} if name == "sgd" else {})
    for option in options:
        if option in settings:
            raise InvalidOption(f"training.optimizer_options: set {option} as training.{settings[option]}")
        if option not in taken:
            raise UnknownName(f"option of optimizer {name}", option, taken - set(settings))
    if weight_decay is not None and "weight_decay" not in taken:
        raise InvalidOption(f"training.weight_decay: {name} has none, leave it out")
