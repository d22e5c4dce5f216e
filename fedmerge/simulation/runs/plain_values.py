"""Values of Python, NumPy, torch and Flower as JSON and tensors: what a checkpoint can hold without pickle."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedmerge.state import State

__all__ = ["NotPlain", "from_plain", "to_plain"]

_MAPPINGS: Mapping[str, type] = {
    kind.__name__: kind for kind in (dict, ArrayRecord, ConfigRecord, MetricRecord, RecordDict)
}
_SEQUENCES: Mapping[str, type] = {kind.__name__: kind for kind in (list, tuple)}


class NotPlain(TypeError):
    """A value of a kind that is not known here."""


def to_plain(value: object, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of `value`; its tensors are added to `tensors`, and come back by name.

    Raises
    ------
    NotPlain
        It holds something else than numbers, texts, bytes, tensors, arrays, Flower's records, and lists, tuples and
        dicts of them.

    Examples
    --------
    >>> tensors = {}
    >>> plain = to_plain({"a": (1, 2.5), 3: torch.ones(2)}, tensors)
    >>> from_plain(plain, tensors)
    {'a': (1, 2.5), 3: tensor([1., 1.])}
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    name = type(value).__name__
    if _SEQUENCES.get(name) is type(value):
        return {name: [to_plain(item, tensors) for item in value]}  # type: ignore[attr-defined]
    if _MAPPINGS.get(name) is type(value):
        items = value.items()  # type: ignore[attr-defined]
        return {name: [[to_plain(key, tensors), to_plain(item, tensors)] for key, item in items]}
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    return _numbers_to_plain(value, tensors)


def _numbers_to_plain(value: object, tensors: dict[str, Tensor]) -> Any:
    """The same for what holds numbers of one type."""
    if isinstance(value, Tensor):
        return {"tensor": _kept(value.detach(), tensors)}
    if isinstance(value, Array):  # Flower's, whose bytes carry a header of their own
        return {"Array": [value.dtype, list(value.shape), value.stype, _kept(_bytes_to_tensor(value.data), tensors)]}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {kind: _kept(torch.from_numpy(np.array(value)), tensors)}
    raise NotPlain(f"a {type(value).__name__}")


def _bytes_to_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _kept(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    name = str(len(tensors))
    tensors[name] = tensor
    return name


def from_plain(plain: Any, tensors: State) -> Any:
    """The value that :func:`to_plain` was given."""
    if not isinstance(plain, dict):
        return plain
    ((kind, held),) = plain.items()
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](from_plain(item, tensors) for item in held)
    if kind in _MAPPINGS:
        return _MAPPINGS[kind]({from_plain(key, tensors): from_plain(item, tensors) for key, item in held})
    return _LEAVES[kind](held, tensors)


def _array_from_plain(held: Any, tensors: State) -> Array:
    dtype, shape, stype, name = held
    return Array(dtype=dtype, shape=tuple(shape), stype=stype, data=tensors[name].numpy().tobytes())


_LEAVES: Mapping[str, Callable[[Any, State], Any]] = {
    "tensor": lambda held, tensors: tensors[held],
    "array": lambda held, tensors: tensors[held].numpy(),
    "scalar": lambda held, tensors: tensors[held].numpy()[()],
    "bytes": lambda held, tensors: base64.b64decode(held),
    "Array": _array_from_plain,
}
