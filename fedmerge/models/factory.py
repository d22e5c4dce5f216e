"""Model factories: the user's own, found by ``module:factory``, and the options that any factory takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from torch import nn

from fedmerge.errors import ModelError, UnknownName
from fedmerge.lookup.loading import load_named

__all__ = ["Factory", "check_options", "factory_options", "load_factory", "wanted"]

# Anything that makes a model when called: a function or a module class.
Factory = Callable[..., nn.Module]

_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_FROM_DATA = ("input_shape", "num_classes")


def load_factory(name: str) -> Factory:
    """Import the factory that ``module:factory`` names.

    The current directory is made importable, in front of all else, as ``python -m`` does.

    Raises
    ------
    ModelError
        The name lacks a part, the import fails, or the module has no such callable.

    Examples
    --------
    >>> load_factory("fedmerge.models.mlp:MLP").__name__
    'MLP'
    """
    factory = load_named(name, "model", "factory", "my_models:small_cnn", ModelError)
    module_name, _, factory_name = name.partition(":")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ModelError(
            f"model {name!r}: {factory_name!r} in module {module_name!r} is a {type(factory).__name__}, "
            "not a factory. Name a function or a module class, each call of which makes a new model."
        )
    try:
        inspect.signature(factory)
    except ValueError as error:
        raise ModelError(
            f"model {name!r}: {factory_name!r} in module {module_name!r} does not tell its parameters. "
            "Wrap it in a Python function."
        ) from error
    result: Factory = factory
    return result


def factory_options(factory: Factory) -> dict[str, object]:
    """Options of a factory with their defaults; a required one has ``inspect.Parameter.empty``.

    Examples
    --------
    >>> from fedmerge.models.mlp import MLP
    >>> factory_options(MLP)
    {'hidden': (100,), 'bias': True}
    """
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.kind in _KEYWORD and parameter.name not in _FROM_DATA
    }


def check_options(name: str, factory: Factory, options: Mapping[str, object]) -> None:
    """Refuse options that the factory does not have, and miss none that it requires.

    Raises
    ------
    UnknownName
        An option that the factory does not have.
    ModelError
        An option without a default is not given.

    Examples
    --------
    >>> from fedmerge.models.mlp import MLP
    >>> check_options("mlp", MLP, {"hiden": 64})
    Traceback (most recent call last):
        ...
    fedmerge.errors.UnknownName: unknown mlp option 'hiden'. Did you mean 'hidden'? Known: bias, hidden.
    """
    known = factory_options(factory)
    parameters = inspect.signature(factory).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    for option in options:
        if option not in known and not takes_any:
            raise UnknownName(f"{name} option", option, known, "" if known else "It takes none.")
    missing = [
        option for option, default in known.items() if default is inspect.Parameter.empty and option not in options
    ]
    if missing:
        raise ModelError(
            f"model {name!r} requires the option {missing[0]!r}, which is not given. "
            "Set it, or give it a default in the factory."
        )


def wanted(factory: Factory, input_shape: tuple[int, ...], num_classes: int) -> dict[str, object]:
    """Those of `input_shape` and `num_classes` that the factory names among its parameters.

    A bare ``**kwargs`` does not count: nobody knows what it is handed on to.

    Examples
    --------
    >>> wanted(lambda num_classes: nn.Linear(2, num_classes), (2,), 3)
    {'num_classes': 3}
    """
    parameters = inspect.signature(factory).parameters
    facts = {"input_shape": input_shape, "num_classes": num_classes}
    return {key: value for key, value in facts.items() if key in parameters and parameters[key].kind in _KEYWORD}
