"""A model at work on a client's examples: its device and mode, the batches that it sees, what it makes of them, and how
it is put back as it was."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge.data.batch_stream import BatchStream
from fedmerge.data.client_data import examples_of
from fedmerge.data.example_sets import Examples
from fedmerge.errors import ModelError
from fedmerge.inputs import call, changed
from fedmerge.layout import FrozenMode, frozen_parts
from fedmerge.tasks import Task

__all__ = [
    "ModelSnapshot",
    "batches",
    "batches_to_measure",
    "device_of",
    "moved",
    "outputs_of",
    "told_of_types",
    "training_mode",
]

_PLAIN = (bool, int, float, complex, str, bytes, tuple, torch.Size, torch.dtype, torch.device)


def training_mode(model: nn.Module, frozen_mode: FrozenMode = "eval") -> None:
    """Put a model into training mode, but for parts that are frozen as a whole, which run as in use.

    Their dropout is off and their batch norms keep to their running statistics, so that what is trained behind them
    sees what it will see in use. With ``frozen_mode="train"`` they go with the rest.

    Examples
    --------
    >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.Dropout(), nn.Linear(3, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> training_mode(model)
    >>> [part.training for part in model]
    [False, True, True]
    """
    model.train()
    for part in frozen_parts(model) if frozen_mode == "eval" else ():
        part.eval()


def device_of(model: nn.Module) -> torch.device:
    """Where a model that is to be trained is.

    Raises
    ------
    ModelError
        It has no parameters.

    Examples
    --------
    >>> device_of(nn.Linear(1, 1))
    device(type='cpu')
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ModelError(f"{type(model).__name__} has no parameters: there is nothing to train")
    return parameter.device


def outputs_of(model: nn.Module, inputs: Any, what: str = "", task: Task | None = None) -> Any:
    """What the model makes of a batch's inputs: a tensor, or several, see :func:`fedmerge.inputs.arguments_of`.

    A task that is given calls the model, see :meth:`~fedmerge.tasks.Task.forward`.

    Raises
    ------
    ModelError
        The inputs are of another type than its parameters.

    Examples
    --------
    >>> outputs_of(nn.Bilinear(2, 3, 1), (torch.zeros(4, 2), torch.zeros(4, 3))).shape
    torch.Size([4, 1])
    """
    with told_of_types(model, inputs, what):
        if task is not None:
            return task.forward(model, inputs)
        return model(inputs) if isinstance(inputs, Tensor) else call(model, inputs)


@contextmanager
def told_of_types(model: nn.Module, x: Any, what: str = "") -> Iterator[None]:
    """Say what is wrong where a model fails on inputs of another type than its parameters, or on too few of them.

    Examples
    --------
    >>> with told_of_types(nn.Linear(2, 1), torch.zeros(1, 2, dtype=torch.long), "client 3"):
    ...     raise RuntimeError("mat1 and mat2 must have the same dtype, but got Long and Float")
    Traceback (most recent call last):
    ...
    fedmerge.errors.ModelError: client 3: the model, whose parameters are torch.float32, cannot take inputs of torch.int64 (mat1 and mat2 must have the same dtype, but got Long and Float): convert them, x.to(torch.float32)
    """  # noqa: E501 - as the error is written
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ModelError(
            f"{what + ': ' if what else ''}batch norm cannot train on a batch of one example: choose a batch_size "
            "that leaves no example over, leave small clients out (partition.min_examples), or use group norm"
        ) from error
    except RuntimeError as error:
        if not isinstance(x, Tensor):  # which of several tensors it was, torch does not say
            raise
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()}
        reason = str(error).partition("\n")[0]
        # Embeddings say so where they get fractions for rows.
        lookup = x.is_floating_point() and "ndices" in reason
        if (x.dtype in kinds and not lookup) or not kinds or not ("dtype" in reason or "type" in reason):
            raise
        want = torch.int64 if lookup else sorted(kinds, key=str)[0]
        raise ModelError(
            f"{what + ': ' if what else ''}the model, whose parameters are {sorted(map(str, kinds))[0]}, cannot take "
            f"inputs of {x.dtype} ({reason}): convert them, x.to({want})"
        ) from error


def moved(batch: tuple[Any, Tensor], device: torch.device | None) -> tuple[Any, Tensor]:
    """Inputs of any form, and targets, on a device."""
    inputs, targets = batch
    if isinstance(inputs, Tensor):
        return inputs.to(device), targets.to(device)
    return changed(inputs, lambda tensor: tensor.to(device)), targets.to(device)


def batches(
    x: Any, y: Tensor | None = None, batch_size: int = 512, device: torch.device | None = None
) -> Iterator[tuple[Any, Tensor]]:
    """All examples in order, `batch_size` at a time, on `device`; `x` and `y` as for :func:`train`."""
    for batch in examples_of(x, y).in_order(batch_size):
        yield moved(batch, device)


def batches_to_measure(examples: Examples, device: torch.device | None = None) -> Iterable[tuple[Any, Tensor]]:
    """All examples in order, to be read as often as it takes: views of tensors, else read anew each time.

    Examples
    --------
    >>> from fedmerge.data.client_data import examples_of
    >>> found = batches_to_measure(examples_of([(torch.zeros(2), 0), (torch.ones(2), 1)]))
    >>> [len(y) for x, y in found], [len(y) for x, y in found]
    ([2], [2])
    """
    return list(batches(examples, device=device)) if examples.tensors is not None else BatchStream(examples, device)


class ModelSnapshot:
    """What a model holds now: tensors by value, attributes of its modules, lists and dicts one level deep.

    Examples
    --------
    >>> model = nn.Linear(1, 1)
    >>> before = ModelSnapshot(model)
    >>> model.calls = 1
    >>> before.changed()
    "its forward pass changes attribute 'calls' of Linear"
    >>> before.restore()
    >>> hasattr(model, "calls")
    False
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(name, p, p.data, p.detach().clone()) for name, p in model.named_parameters()]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._modules = [
            (module, {key: (v, _held(v)) for key, v in vars(module).items()}) for module in model.modules()
        ]

    def changed(self) -> str | None:
        """The first change that is not one of a buffer in place, in words."""
        for name, parameter, data, value in self._parameters:
            moved = parameter.data_ptr() != data.data_ptr()
            if moved or not torch.allclose(parameter.detach(), value, rtol=0, atol=0, equal_nan=True):
                return f"its forward pass changes parameter {name!r}"
        for module, kept in self._modules:
            now = vars(module)
            for key in {**kept, **now}:
                if key not in kept or key not in now or not _same(now[key], *kept[key]):
                    return f"its forward pass changes {_described(key)} of {type(module).__name__}"
        return None

    @torch.no_grad()
    def restore(self, *, parameters: bool = True) -> None:
        """Put everything back; without `parameters` not their values, where others are about to be loaded."""
        for module, kept in self._modules:
            for key in vars(module).keys() - kept.keys():
                del module.__dict__[key]
            for key, (value, held) in kept.items():
                if not _same(value, value, held):
                    _refill(value, held)
                module.__dict__[key] = value
        for _, parameter, data, value in self._parameters:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            if parameters:
                _put(parameter, value)
        for buffer, value in self._buffers:
            _put(buffer, value)


def _put(tensor: Tensor, value: Tensor) -> None:
    if not torch.equal(tensor, value):  # a tensor that was expanded cannot be written to, nor has it changed
        tensor.copy_(value)


def _described(key: str) -> str:
    return "its buffers, other than in place," if key == "_buffers" else f"attribute {key!r}"


def _held(value: object) -> Any:
    """What may change within a value: the contents of a container, the state of a generator."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | deque | set):
        return list(value)
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, random.Random):
        return value.getstate()
    return None


def _same(now: object, value: object, held: Any) -> bool:
    if now is not value:
        return type(now) is type(value) and isinstance(value, _PLAIN) and now == value
    if isinstance(value, dict):
        items = list(value.items())
        return len(items) == len(held) and all(a is c and b is d for (a, b), (c, d) in zip(items, held, strict=True))
    if isinstance(value, list | deque | set):
        return len(value) == len(held) and all(a is b for a, b in zip(value, held, strict=True))
    found_state = _held(value)
    return torch.equal(found_state, held) if isinstance(held, Tensor) else repr(found_state) == repr(held)


def _refill(value: Any, held: Any) -> None:
    if isinstance(value, dict):
        value.clear()
        value.update(held)
    elif isinstance(value, list | deque):
        value.clear()
        value.extend(held)
    elif isinstance(value, set):
        value.clear()
        value.update(held)
    elif isinstance(value, torch.Generator):
        value.set_state(held)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = held
    elif isinstance(value, random.Random):
        value.setstate(held)
