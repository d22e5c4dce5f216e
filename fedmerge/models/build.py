"""Models by name, initialised from a seed of their own."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import nn

from fedmerge.errors import InvalidOption, ModelError, UnknownName
from fedmerge.models.factory import Factory, check_options, factory_options, load_factory, wanted
from fedmerge.registry import entries, registered

__all__ = ["build_model", "model_names", "model_options"]

_SMALL_FIRST = ("logistic", "mlp", "lenet", "vgg9", "resnet8", "resnet20", "char_lstm", "vit", "efficientnet_lite0")


def model_names() -> list[str]:
    """Names that `build_model` knows: small models first, then what other packages register.

    Examples
    --------
    >>> model_names()
    ['logistic', 'mlp', 'lenet', 'vgg9', 'resnet8', 'resnet20', 'char_lstm', 'vit', 'efficientnet_lite0']
    """
    known = entries("model")
    return [*_SMALL_FIRST, *(name for name in known if name not in _SMALL_FIRST)]


def model_options(name: str) -> dict[str, object]:
    """Options of a model with their defaults.

    Parameters
    ----------
    name
        A registered name, or ``module:factory``; an option that a user's factory requires has
        ``inspect.Parameter.empty`` for a default.

    Raises
    ------
    UnknownName
        No model has this name.
    ModelError
        The user's factory cannot be imported.

    Examples
    --------
    >>> model_options("lenet")
    {'channels': (6, 16), 'hidden': (120, 84), 'kernel': 5, 'bias': True}
    """
    return factory_options(_find(name))


def build_model(
    name: str, input_shape: tuple[int, ...], num_classes: int, *, seed: int, **options: object
) -> nn.Module:
    """Build a model and initialise it: the same seed gives the same bits.

    The weights are drawn on the CPU from torch's generator, which is seeded for the call and put back
    afterwards, so no other draw in the program changes. A factory of the user's own is seeded through this
    generator only: what it draws from ``random`` or ``numpy.random`` is its own affair.

    Parameters
    ----------
    name
        One of `model_names`, or ``module:factory``: a function or module class in a module that can be
        imported from the current directory. It is called with `input_shape` and `num_classes` where it has
        parameters of these names, and with the options.
    input_shape
        Shape of one example, without the batch axis: (channels, height, width) of images, (length,) of
        sequences of character ids.
    num_classes
        Number of classes; the size of the alphabet for ``char_lstm``.
    seed
        Seed of the initial weights, a whole number from 0 to 2**64 - 1.
    **options
        Options of the model, see `model_options`.

    Returns
    -------
    nn.Module
        Maps inputs [B, *input_shape] to logits [B, num_classes], and ``char_lstm`` to [B, T, num_classes].

    Raises
    ------
    UnknownName
        No model has this name, or the model has no such option.
    InvalidOption
        An option or the seed has a value of the wrong type or range.
    ModelError
        The model cannot take this input shape or number of classes, or the user's factory cannot be
        imported or does not return a module.

    Examples
    --------
    >>> model = build_model("mlp", (1, 8, 8), 10, seed=0, hidden=[32])
    >>> model(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    factory = _find(name)
    check_options(name, factory, options)
    arguments = wanted(factory, _shape(name, input_shape), _classes(name, num_classes))
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64:
        raise InvalidOption(f"the seed of model {name!r} must be a whole number from 0 to 2**64 - 1, not {seed!r}.")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would reseed every accelerator too, and only the CPU is guarded here.
        torch.default_generator.manual_seed(int(seed))
        model: object = factory(**arguments, **options)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {name!r}: the factory returned a {type(model).__name__}, not a torch.nn.Module. "
            "Return the module that it builds."
        )
    return model


def _find(name: str) -> Factory:
    if ":" in name:
        return load_factory(name)
    known_factory = registered("model", name)
    if known_factory is None:
        module, _, last = name.rpartition(".")
        yours = f", such as '{module}:{last}'" if module else ""
        raise UnknownName("model", name, model_names(), f"Your own model goes by 'module:factory'{yours}.")
    factory: Factory = known_factory.cls
    return factory


def _shape(name: str, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    is_shape = isinstance(input_shape, list | tuple) and len(input_shape) > 0
    if not is_shape or not all(_positive(size) for size in input_shape):
        raise ModelError(
            f"model {name!r}: the input shape must be one or more sizes above 0, not {input_shape!r}. "
            "Give the shape of one example without the batch axis, such as (1, 28, 28)."
        )
    return tuple(int(size) for size in input_shape)


def _classes(name: str, num_classes: int) -> int:
    if not _positive(num_classes):
        raise ModelError(
            f"model {name!r}: the number of classes must be a whole number above 0, not {num_classes!r}. "
            "Count the classes of the data set."
        )
    return int(num_classes)


def _positive(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
