"""Arguments of the functions that people call: what may stand there, and words for what may not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.checks.validation import LEAST_WEIGHT, MOST_EXAMPLES
from fedmerge.errors import BadUpdate, InvalidOption, UnknownName, shown
from fedmerge.inputs import tensors_of
from fedmerge.merging import main_part, options_elsewhere
from fedmerge.offline.at_hand import AtHand
from fedmerge.offline.loaders import Inputs, first_inputs, read_inputs_of, read_pairs
from fedmerge.questions import Trust
from fedmerge.refine.privacy import Privacy
from fedmerge.registry import entries
from fedmerge.statistics.statistic_type import Batches

__all__ = [
    "MergeArguments",
    "as_example",
    "as_statistics",
    "as_weights",
    "check_keywords",
    "check_method",
    "check_policies",
    "check_seed",
    "check_signs",
    "one_each",
]


@dataclass(frozen=True)
class MergeArguments:
    """What :func:`fedmerge.merge` was given besides models, checked."""

    weights: list[float]
    statistics: list[dict[str, Any]] | None
    data: Inputs | None
    clients: list[Batches] | None
    example: Any
    seed: int

    @classmethod
    def of(
        cls, hand: AtHand, weights: Any, statistics: Any, data: Any, clients: Any, example: Any, seed: Any
    ) -> MergeArguments:
        """Check all of them.

        Raises
        ------
        InvalidOption
            One cannot be used.
        """
        number = len(hand.models)
        loaders = None if clients is None else one_each("clients", clients, number)
        return cls(
            as_weights(weights, number),
            as_statistics(statistics, number),
            None if data is None else read_inputs_of(data, "data"),
            None if loaders is None else [read_pairs(loader, f"clients[{i}]") for i, loader in enumerate(loaders)],
            as_example(example),
            check_seed(seed),
        )

    def shown(self, *, traced: bool) -> Any:
        """One batch of inputs, where a model has to be traced: its shape is all that tracing looks at."""
        if self.example is None and traced and self.data is None and self.clients is not None:
            return first_inputs(self.clients)
        return self.example


def check_method(method: Any) -> None:
    """Make sure that a method is named by text.

    Raises
    ------
    InvalidOption
        It is not.
    """
    if isinstance(method, nn.Module):
        raise InvalidOption("models go in one list: fedmerge.merge([model_a, model_b])")
    if not isinstance(method, str) or not method.strip():
        raise InvalidOption(f'method must be a name such as "fedavg" (see fedmerge.methods()), got {shown(method)}')


def check_policies(repair: Any, privacy: Any, trust: Any) -> None:
    """Make sure that a repair is named by text, and privacy and trust described by what describes them.

    Raises
    ------
    InvalidOption
        They are something else.
    """
    if not isinstance(repair, str):
        raise InvalidOption(f'repair must be "auto", "rescale" or "none", got {shown(repair)}')
    if privacy is not None and not isinstance(privacy, Privacy):
        raise InvalidOption(f"privacy must be a fedmerge.refine.Privacy(...), got {shown(privacy)}")
    if trust is not None and not isinstance(trust, Trust):
        raise InvalidOption(f"trust must be a fedmerge.refine.Trust(...), got {shown(trust)}")


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
    first = main_part(method)
    entry = entries("aggregator").get(first.name)
    if entry is None:
        return  # told better by whoever builds the method
    known = {*entry.options, *own}
    for option in options:
        if option not in known:
            raise UnknownName(f"option of {first.name}", option, known, options_elsewhere(method, option))


def check_signs(weights: Sequence[float], method: str, aggregator: Aggregator) -> None:
    """Make sure that models are subtracted only by methods that can.

    Raises
    ------
    BadUpdate
        A weight is below 0, and the method takes none.
    """
    if aggregator.allows_negative_weights:
        return
    for i, weight in enumerate(weights):
        if weight < 0:
            able = [name for name, entry in entries("aggregator").items() if entry.cls.allows_negative_weights]
            raise BadUpdate(
                i,
                f"its weight (number of examples) is {weight:g}, and {method} subtracts no models",
                f"Pass a positive number, or take a method that does: {', '.join(able)}.",
            )


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
    try:
        each = list(value)
    except Exception as error:  # what a person iterates over may raise anything
        raise InvalidOption(f"{name} cannot be read as a list: {type(error).__name__}: {error}") from error
    if len(each) != number:
        raise InvalidOption(f"{name} has {len(each)} entries for {number} models: pass one each")
    return each


def as_weights(value: Any, number: int, name: str = "weights") -> list[float]:
    """A number for each model; equal ones where nothing is given; `name` is the argument that holds them.

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
    for i, share in enumerate(one_each(name, value, number)):
        try:
            weight = float("nan") if isinstance(share, str | bytes) else float(share)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InvalidOption(f"{name}[{i}] must be a number, got {shown(share)}") from error
        if isinstance(share, str | bytes):
            raise InvalidOption(f"{name}[{i}] must be a number, got {shown(share)}")
        weights.append(weight)
    return _within_range(weights)


def _within_range(weights: list[float]) -> list[float]:
    """Weights as they are, or where they are no numbers of examples that sums can take, in parts of the largest."""
    usable = all(0 < weight < math.inf for weight in weights)
    if not usable or all(LEAST_WEIGHT <= weight <= MOST_EXAMPLES for weight in weights):
        return weights
    return [max(weight / max(weights), LEAST_WEIGHT) for weight in weights]


def as_statistics(value: Any, number: int) -> list[dict[str, Any]] | None:
    """A mapping for each model.

    Raises
    ------
    InvalidOption
        They are something else.
    """
    if value is None:
        return None
    values = one_each("statistics", value, number)
    for i, mapping in enumerate(values):
        if not isinstance(mapping, Mapping):
            raise InvalidOption(
                f"statistics[{i}] must be what compute_statistics(model, loader, names) returns, got {shown(mapping)}"
            )
    return [dict(mapping) for mapping in values]


def as_example(value: Any) -> Any:
    """A batch of inputs: a tensor, or tensors in whatever nest the model takes them in.

    Raises
    ------
    InvalidOption
        It is none.
    """
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        if not value.ndim or not value.numel():
            raise InvalidOption(
                f"example must be a batch of inputs [n, ...], got a tensor of shape {list(value.shape)}"
            )
        return value
    if value is None or (not isinstance(value, nn.Module) and tensors_of(value) and not _is_batch(value)):
        return value
    hint = ": of a batch (inputs, targets) pass the inputs alone" if isinstance(value, list) else ""
    raise InvalidOption(f"example must be a batch of inputs, a tensor [n, ...], got {shown(value)}{hint}")


def _is_batch(value: Any) -> bool:
    """Whether a list looks like inputs and their labels, rather than two inputs."""
    pair = isinstance(value, list) and len(value) == 2 and all(isinstance(part, Tensor) for part in value)
    return bool(pair and value[1].ndim <= 1 < value[0].ndim)
