"""A model as it is, to be put back after others have used it: its tensors, and what its modules note in attributes."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["ModelSnapshot"]

_PLAIN = (bool, int, float, complex, str, bytes, tuple, torch.Size, torch.dtype, torch.device)


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
