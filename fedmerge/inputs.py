"""What a model is called with, in any form: a tensor, a tuple of arguments, keywords in a mapping, nests of these."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from operator import length_hint
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "OnDeviceOf",
    "arguments_of",
    "beside",
    "call",
    "changed",
    "evenly",
    "examples_in",
    "joined",
    "rows",
    "split",
    "tensors_of",
]


def arguments_of(module: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a module is called with an example: positional arguments and keywords.

    A tuple holds the arguments, where ``forward`` takes so many. A mapping, alone or at the end of a tuple, holds
    keywords, where ``forward`` has such names. Everything else is one argument.

    Examples
    --------
    >>> class Both(nn.Module):
    ...     def forward(self, x, mask=None): ...
    >>> arguments_of(Both(), {"x": 1, "mask": 2}), arguments_of(Both(), (1, {"mask": 2}))
    (((), {'x': 1, 'mask': 2}), ((1,), {'mask': 2}))
    >>> arguments_of(nn.Linear(2, 1), {"x": 1, "mask": 2})
    (({'x': 1, 'mask': 2},), {})
    """
    positional = tuple(example) if isinstance(example, tuple) and _binds(module, tuple(example), {}) else (example,)
    if positional and isinstance(positional[-1], Mapping):
        names = dict(positional[-1])
        if all(isinstance(name, str) for name in names) and _binds(module, positional[:-1], names, unknown=False):
            return positional[:-1], names
    return positional, {}


def _binds(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, unknown: bool = True) -> bool:
    try:
        inspect.signature(getattr(module, "called_like", module).forward).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # a forward that is not Python does not tell
        return unknown
    return True


def call(module: nn.Module, example: Any) -> Any:
    """The module's outputs on an example of any form, see :func:`arguments_of`, on any device."""
    args, kwargs = arguments_of(module, beside(module, example))
    return module(*args, **kwargs)


def beside(module: nn.Module, nest: Any) -> Any:
    """The same nest with its tensors on the device of the module's parameters; as it is where they are there.

    Examples
    --------
    >>> import torch
    >>> beside(nn.Linear(1, 1, device="meta"), (torch.ones(2), "name"))
    (tensor(..., device='meta', size=(2,)), 'name')
    """
    parameter = next(module.parameters(), None)
    if parameter is None or all(tensor.device == parameter.device for tensor in tensors_of(nest)):
        return nest
    return changed(nest, lambda tensor: tensor.to(parameter.device))


@dataclass(frozen=True, eq=False)
class OnDeviceOf:
    """Batches on the device of a model's parameters, moved one at a time; read as often as `batches` can be.

    A DataLoader gives tensors on the CPU, wherever the model is.

    Parameters
    ----------
    model
        Whose device; batches of a model without parameters stay where they are.
    batches
        Nests of tensors.

    Examples
    --------
    >>> import torch
    >>> [x.device.type for x, y in OnDeviceOf(nn.Linear(1, 1), [(torch.zeros(2, 1), torch.zeros(2))])]
    ['cpu']
    """

    model: nn.Module
    batches: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield beside(self.model, batch)

    def __length_hint__(self) -> int:
        return length_hint(self.batches)


def changed(nest: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples, lists, mappings and dataclasses with other tensors in it; nothing is changed in place.

    Examples
    --------
    >>> import torch
    >>> changed({"x": torch.ones(1), "names": ["a", None]}, lambda x: x + 1)
    {'x': tensor([2.]), 'names': ['a', None]}
    """
    if isinstance(nest, Tensor):
        return change(nest)
    if isinstance(nest, Mapping):
        return _changed_mapping(nest, change)
    if isinstance(nest, list | tuple):
        parts = [changed(part, change) for part in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)
    names = _attributes(nest)
    twin = copy.copy(nest) if names else nest
    for name in names:
        object.__setattr__(twin, name, changed(getattr(nest, name), change))  # frozen dataclasses too
    return twin


def _changed_mapping(nest: Mapping[Any, Any], change: Callable[[Tensor], Tensor]) -> Mapping[Any, Any]:
    parts = {key: changed(value, change) for key, value in nest.items()}
    if type(nest) is dict or not isinstance(nest, MutableMapping):
        return parts
    twin = copy.copy(nest)  # what else it holds stays: transformers' batches know how they were encoded
    for key, value in parts.items():
        twin[key] = value
    return twin


def _attributes(nest: Any) -> list[str]:
    if isinstance(nest, SimpleNamespace):
        return list(vars(nest))
    if is_dataclass(nest) and not isinstance(nest, type):
        return [field.name for field in fields(nest) if hasattr(nest, field.name)]
    return []


def tensors_of(nest: Any) -> list[Tensor]:
    """All tensors in a nest, in its order."""
    return list(_tensors(nest, set()))


def _tensors(nest: Any, within: set[int]) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
        return
    if isinstance(nest, Mapping):
        parts: Any = nest.values()
    elif isinstance(nest, list | tuple):
        parts = nest
    elif hasattr(nest, "__dict__") and not isinstance(nest, type | nn.Module) and not callable(nest):
        parts = vars(nest).values()
    else:
        return
    if id(nest) not in within:  # an object may hold itself
        for part in parts:
            yield from _tensors(part, within | {id(nest)})


def examples_in(nest: Any) -> int:
    """How many examples a batch holds: the length of the first axis of its first tensor with axes, or 1."""
    return next((len(tensor) for tensor in tensors_of(nest) if tensor.ndim), 1)


def rows(nest: Any, index: slice | Tensor) -> Any:
    """Some of a batch's examples: rows of the tensors that are as long as the batch; others are passed on.

    Examples
    --------
    >>> import torch
    >>> x, mask = torch.zeros(8, 3), torch.ones(3, 3)
    >>> [tuple(part.shape) for part in rows((x, mask), slice(2))]
    [(2, 3), (3, 3)]
    """
    number = examples_in(nest)
    return changed(nest, lambda tensor: tensor[index] if tensor.ndim and len(tensor) == number else tensor)


def split(nest: Any, targets: Tensor, size: int) -> Iterator[tuple[Any, Tensor]]:
    """A batch in pieces of so many examples.

    Examples
    --------
    >>> import torch
    >>> [len(y) for x, y in split({"x": torch.zeros(5, 2)}, torch.zeros(5), 2)]
    [2, 2, 1]
    """
    if isinstance(nest, Tensor):
        yield from zip(torch.split(nest, size), torch.split(targets, size), strict=True)
        return
    for start in range(0, examples_in(nest), size):
        piece = slice(start, start + size)
        yield rows(nest, piece), targets[piece]


def joined(nests: Sequence[Any]) -> Any:
    """Several batches as one: tensors that are as long as their batch behind each other, others as the first has them.

    Examples
    --------
    >>> import torch
    >>> joined([(torch.zeros(2, 3), "a"), (torch.ones(1, 3), "a")])[0].shape
    torch.Size([3, 3])
    """
    first = nests[0]
    if isinstance(first, Tensor):
        return torch.cat(list(nests))
    tensors = zip(*(tensors_of(nest) for nest in nests), strict=True)
    lengths = [examples_in(nest) for nest in nests]
    whole = iter(
        [
            torch.cat(parts) if all(p.ndim and len(p) == n for p, n in zip(parts, lengths, strict=True)) else parts[0]
            for parts in tensors
        ]
    )
    return changed(first, lambda _: next(whole))


def evenly(batches: Iterable[Any], number: int | None, most: int) -> Iterator[Any]:
    """At most so many examples, evenly from all batches, as the first ones may all be of one kind.

    Parameters
    ----------
    batches
        Of inputs, of any form that a model takes.
    number
        How many batches there are; where that is unknown, the first are taken.
    most
        How many examples.

    Examples
    --------
    >>> [x.tolist() for x in evenly(torch.arange(12).split(4), 3, 6)]
    [[0, 2], [4, 6], [8, 10]]
    """
    taken = 0
    for i, x in enumerate(batches):
        share = most - taken if number is None else (i + 1) * most // number - taken
        size = examples_in(x)
        share = min(share, size, most - taken)
        if share > 0:
            yield x if share == size else rows(x, torch.arange(share) * size // share)
        taken += max(share, 0)
        if taken >= most:
            return
