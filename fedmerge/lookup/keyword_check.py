"""Callables and their keywords: a misspelt one is told with the one that was meant."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from fedmerge.errors import InvalidOption, UnknownName, shown

__all__ = ["check_function", "tell_keywords"]

Class = TypeVar("Class", bound=type)


def tell_keywords(usual: Mapping[str, str] | None = None) -> Callable[[Class], Class]:
    """Let a class name the keyword that was meant in place of one that it does not have.

    Parameters
    ----------
    usual
        Keywords by what other programs call them.

    Examples
    --------
    >>> from fedmerge.training import LocalTraining
    >>> LocalTraining(lr=0.1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    fedmerge.errors.UnknownName: unknown keyword of LocalTraining 'lr'. Did you mean 'learning_rate'? ...
    """

    def decorate(cls: Class) -> Class:
        make = cls.__init__  # type: ignore[misc]
        known = list(inspect.signature(make).parameters)[1:]

        @functools.wraps(make)
        def checked(self: Any, *arguments: Any, **keywords: Any) -> None:
            for name in keywords:
                if name not in known:
                    raise UnknownName(f"keyword of {cls.__name__}", name, known, guess=(usual or {}).get(name))
            make(self, *arguments, **keywords)

        cls.__init__ = checked  # type: ignore[misc]
        return cls

    return decorate


def check_function(name: str, function: Any, parameters: tuple[str, ...] = ()) -> None:
    """Make sure that an argument is a function that can be called with some arguments.

    Parameters
    ----------
    name
        How the argument is called.
    function
        What was given.
    parameters
        What it will be called with.

    Raises
    ------
    InvalidOption
        It is something else, or takes other arguments.

    Examples
    --------
    >>> check_function("data_fn", lambda partition: None, ("partition_id", "num_partitions"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    fedmerge.errors.InvalidOption: data_fn is called as data_fn(partition_id, num_partitions), which <lambda>() ...
    """
    call = f"{name}({', '.join(parameters)})"
    if isinstance(function, nn.Module) or not callable(function):
        raise InvalidOption(
            f"{name} must be a function, called as {call}, got {shown(type(function).__name__)}: "
            "pass the function itself, without parentheses behind it"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C: it does not tell
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        called = getattr(function, "__name__", type(function).__name__)
        raise InvalidOption(
            f"{name} is called as {call}, which {called}() does not take ({error}): give it these parameters"
        ) from error
