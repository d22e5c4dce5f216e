"""Optimisers of a client's local training: any of ``torch.optim``, by name and options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from fedmerge.errors import InvalidOption, UnknownName

if TYPE_CHECKING:
    from fedmerge.training.local_training import LocalTraining

__all__ = ["STACKED_OPTIONS", "check_optimizer", "default_decay", "make_optimizer", "optimizer_names"]

STACKED_OPTIONS: Mapping[str, frozenset[str]] = {
    "sgd": frozenset(),
    "adam": frozenset({"betas", "eps"}),
    "adamw": frozenset({"betas", "eps"}),
}
"""Optimisers of which one call takes a step of many clients, and the options with which it still does."""

# Settings of LocalTraining by their names in torch.
_OWN_SETTINGS = {"lr": "learning_rate", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}


@cache
def _classes() -> dict[str, type[Optimizer]]:
    found = {name.lower(): kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    return {name: kind for name, kind in found.items() if issubclass(kind, Optimizer) and kind is not Optimizer}


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


def make_optimizer(settings: LocalTraining, parameters: list[nn.Parameter]) -> Optimizer:
    """A fresh optimiser.

    Raises
    ------
    InvalidOption
        It does not take such options, or such parameters.
    """
    kind = _classes()[settings.optimizer]
    arguments: dict[str, Any] = {"lr": settings.learning_rate, **_tuples(settings.optimizer_options)}
    if settings.optimizer == "sgd":
        arguments["momentum"] = settings.momentum
    if settings.weight_decay is not None:
        arguments["weight_decay"] = settings.weight_decay
    try:
        return kind(parameters, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidOption(f"training.optimizer = {settings.optimizer!r}: {error}") from error


def check_optimizer(settings: LocalTraining) -> None:
    """Make sure that there is such an optimiser, and that it takes the options given.

    Raises
    ------
    UnknownName
        There is no such optimiser, or no such option of it.
    InvalidOption
        It cannot train a client, or an option has a value that it does not take.
    """
    name, options = settings.optimizer, settings.optimizer_options
    if name not in optimizer_names():
        if name == "lbfgs":
            raise InvalidOption(
                "training.optimizer = 'lbfgs' computes the loss several times in a step, which local training does "
                "not: take another, or a training function of your own (training.train_fn)"
            )
        raise UnknownName("optimizer", name, optimizer_names())
    taken = _parameters(name).keys() - {"params"}
    own = _OWN_SETTINGS | ({"momentum": "momentum"} if name == "sgd" else {})
    for option in options:
        if option in own:
            raise InvalidOption(f"training.optimizer_options: set {option} as training.{own[option]}")
        if option not in taken:
            raise UnknownName(f"option of optimizer {name}", option, taken - set(own))
    if settings.weight_decay is not None and "weight_decay" not in taken:
        raise InvalidOption(f"training.weight_decay: {name} has none, leave it out")
    if options or name not in STACKED_OPTIONS:
        make_optimizer(settings, [nn.Parameter(torch.zeros(1, 1))])


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as torch wants them: TOML and JSON know lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
