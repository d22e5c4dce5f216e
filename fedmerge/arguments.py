"""Arguments of the functions that people call: what may stand there, and words for what may not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption, ModelError, UnknownName, shown
from fedmerge.method_names import parse_method
from fedmerge.registry import entries

__all__ = [
    "as_example",
    "as_statistics",
    "as_weights",
    "check_base",
    "check_keywords",
    "check_method",
    "check_seed",
    "one_each",
]


def check_method(method: Any) -> None:
    """Make sure that a method is named by text.

    Raises
    ------
    InvalidOption
        It is not.
    """
    if not isinstance(method, str) or not method.strip():
        raise InvalidOption(f'method must be a name such as "fedavg" (see fedmerge.methods()), got {shown(method)}')


def check_keywords(method: str, options: Mapping[str, Any], own: Iterable[str]) -> None:
    """Make sure that every keyword is one of the function's own or an option of the method.

    Raises
    ------
    UnknownName
        One is neither; the error names the nearest, and where options of other parts are written.

    Examples
    --------
    >>> check_keywords("fedavg", {"weigths": [1, 2]}, ["weights", "base"])
    Traceback (most recent call last):
        ...
    fedmerge.errors.UnknownName: unknown option of fedavg 'weigths'. Did you mean 'weights'? Known: base, weights.
    """
    first, *others = parse_method(method)
    found = entries("aggregator").get(first.name)
    if found is None:
        return  # told better by whoever builds the method
    known = {*found.options, *own}
    for option in options:
        if option not in known:
            parts = {**entries("server step"), **entries("refinement")}
            holders = [p.name for p in others if p.name in parts and option in parts[p.name].options]
            remedy = "" if not holders else f"Options of {holders[0]} stand behind it: {holders[0]}({option}=...)."
            raise UnknownName(f"option of {first.name}", option, known, remedy)


def check_seed(seed: Any) -> int:
    """A whole number from 0 on.

    Raises
    ------
    InvalidOption
        It is none.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InvalidOption(f"seed must be a whole number of at least 0, got {shown(seed)}")
    return int(seed)


def one_each(name: str, value: Any, number: int) -> list[Any]:
    """The entries of an argument that has one for each model.

    Raises
    ------
    InvalidOption
        It is no sequence, or one of another length.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise InvalidOption(f"{name} must be a list with one entry per model ({number}), got {shown(value)}")
    entries_of = list(value)
    if len(entries_of) != number:
        raise InvalidOption(f"{name} has {len(entries_of)} entries for {number} models: pass one each")
    return entries_of


def as_weights(value: Any, number: int) -> list[float]:
    """A positive number for each model; equal ones where nothing is given.

    Raises
    ------
    InvalidOption
        They are something else.

    Examples
    --------
    >>> as_weights(np.array([3, 1]), 2)
    [3.0, 1.0]
    """
    if value is None:
        return [1.0] * number
    weights = []
    for i, one in enumerate(one_each("weights", value, number)):
        try:
            weight = float("nan") if isinstance(one, str | bytes) else float(one)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InvalidOption(f"weights[{i}] must be a number, got {shown(one)}") from error
        if isinstance(one, str | bytes):
            raise InvalidOption(f"weights[{i}] must be a number, got {shown(one)}")
        if not (math.isfinite(weight) and weight > 0):
            raise InvalidOption(
                f"weights[{i}] is {weight:g}: weights are positive numbers, such as each model's examples; leave out "
                "a model that should not count"
            )
        weights.append(weight)
    return weights


def as_statistics(value: Any, number: int) -> list[dict[str, Any]] | None:
    """A mapping for each model.

    Raises
    ------
    InvalidOption
        They are something else.
    """
    if value is None:
        return None
    found = one_each("statistics", value, number)
    for i, one in enumerate(found):
        if not isinstance(one, Mapping):
            raise InvalidOption(
                f"statistics[{i}] must be what compute_statistics(model, loader, names) returns, got {shown(one)}"
            )
    return [dict(one) for one in found]


def as_example(value: Any) -> Any:
    """A batch of inputs: a tensor, or tensors in a tuple or a mapping where the model takes several.

    Raises
    ------
    InvalidOption
        It is none.
    """
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        if not value.ndim or not value.numel():
            raise InvalidOption(f"example must be a batch of inputs [n, ...], got a tensor of shape {list(value.shape)}")
        return value
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if value is None or (isinstance(value, tuple | Mapping) and parts and _hold_tensors(parts)):
        return value
    hint = ": of a batch (inputs, targets) pass the inputs alone" if isinstance(value, list) else ""
    raise InvalidOption(f"example must be a batch of inputs, a tensor [n, ...], got {shown(value)}{hint}")


def _hold_tensors(parts: Sequence[Any]) -> bool:
    return any(isinstance(part, Tensor) for part in parts)


def check_base(base: Any, like: Mapping[str, Tensor]) -> nn.Module:
    """Make sure that a base is a module with the same names.

    Raises
    ------
    InvalidOption
        It is no module.
    ModelError
        It is one of another architecture.
    """
    if not isinstance(base, nn.Module):
        hint = ": load the state_dict into a module first" if isinstance(base, Mapping) else ""
        raise InvalidOption(
            f"base must be the module that all models started from, got {type(base).__name__} {shown(base, 60)}{hint}"
        )
    if isinstance(base, nn.ModuleList):
        raise InvalidOption("base must be one module, got a list of them")
    names = {name for name in base.state_dict() if not name.endswith("_extra_state")}
    if names != set(like):
        other = sorted(names ^ set(like))[:3]
        raise ModelError(f"base is of another architecture than the models: they do not share {', '.join(other)}")
    return base
