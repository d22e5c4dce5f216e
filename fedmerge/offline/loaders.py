"""Batches that a person hands over: pairs of inputs and targets, whatever brings them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.errors import DataError, FedMergeError, InvalidOption, shown
from fedmerge.inputs import rows, tensors_of

Batches = Iterable[tuple[Any, Tensor]]

__all__ = ["Inputs", "Pairs", "few", "first_inputs", "read_inputs_of", "read_pairs"]


class Pairs:
    """A loader whose batches are checked as they are read: ``(inputs, targets)``, as many of one as of the other."""

    def __init__(self, loader: Iterable[Any], where: str) -> None:
        self._loader, self._where = loader, where

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        number = -1
        for number, batch in enumerate(_read(self._loader, self._where)):
            yield _pair(batch, f"{self._where}, batch {number}")
        if number < 0:
            raise InvalidOption(f"{self._where} has no batches: there are no examples to measure on")

    def __length_hint__(self) -> int:
        return _length(self._loader)


class Inputs:
    """Batches on a server: inputs, or ``(inputs, targets)``, checked as they are read."""

    def __init__(self, loader: Iterable[Any], where: str) -> None:
        self._loader, self._where = loader, where

    def __iter__(self) -> Iterator[Any]:
        number = -1
        for number, batch in enumerate(_read(self._loader, self._where)):
            where = f"{self._where}, batch {number}"
            if isinstance(batch, tuple | list) and len(batch) == 2:
                yield _pair(batch, where)
            else:
                yield _tensor(batch[0] if isinstance(batch, tuple | list) and len(batch) == 1 else batch, where)
        if number < 0:
            raise InvalidOption(f"{self._where} has no batches: there are no inputs")

    def __length_hint__(self) -> int:
        return _length(self._loader)


def read_pairs(loader: Any, where: str) -> Batches:
    """A client's batches, which can be read several times.

    Parameters
    ----------
    loader
        A ``DataLoader``, a list of pairs, one pair of tensors, or an iterator, which is read into a list.
    where
        What it is called in errors.

    Raises
    ------
    InvalidOption
        It is nothing that gives batches. Batches themselves are checked when they are read.

    Examples
    --------
    >>> [len(x) for x, y in read_pairs((torch.zeros(3, 2), torch.zeros(3)), "loader")]
    [3]
    """
    if isinstance(loader, tuple) and len(loader) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in loader):
        return Pairs([loader], where)  # one batch
    return Pairs(_reread(loader, where, "(inputs, targets)"), where)


def read_inputs_of(loader: Any, where: str) -> Inputs:
    """A server's batches, which can be read several times; one tensor is one batch.

    Raises
    ------
    InvalidOption
        It is nothing that gives batches.
    """
    if isinstance(loader, Tensor | np.ndarray):
        return Inputs([loader], where)
    pair = isinstance(loader, tuple) and len(loader) == 2 and all(isinstance(part, Tensor) for part in loader)
    if pair and loader[1].ndim <= 1 < loader[0].ndim:  # inputs and labels, rather than two batches of inputs
        return Inputs([loader], where)
    return Inputs(_reread(loader, where, "inputs, or of (inputs, targets)"), where)


def first_inputs(loaders: Iterable[Batches]) -> Any:
    """Inputs of the first batch that there is; None without any."""
    return next((inputs for loader in loaders for inputs, _ in loader), None)


def _read(loader: Iterable[Any], where: str) -> Iterator[Any]:
    try:
        yield from loader
    except FedMergeError:
        raise
    except Exception as error:  # a person's own data set may raise anything
        raise DataError(f"{where} cannot be read: {type(error).__name__}: {error}") from error


def few(inputs: Any) -> Any:
    """Two of a batch's inputs: enough to see what a model makes of them."""
    return rows(inputs, slice(2))


def _reread(loader: Any, where: str, of: str) -> Iterable[Any]:
    data = torch.utils.data
    if isinstance(loader, data.Dataset) and not isinstance(loader, data.IterableDataset):
        raise InvalidOption(f"{where} is a data set, which gives single examples: pass DataLoader(dataset, 64)")
    if isinstance(loader, str | bytes | Mapping | Tensor | np.ndarray) or not isinstance(loader, Iterable):
        raise InvalidOption(f"{where} must give batches of {of}, as a DataLoader does; got {shown(loader, 80)}")
    return list(loader) if isinstance(loader, Iterator) else loader


def _pair(batch: Any, where: str) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        keys = ", ".join(map(str, list(batch)[:5]))
        raise DataError(
            f"{where} is a mapping ({keys}): batches are pairs (inputs, targets); wrap the loader, as in "
            f"[(b[{shown(next(iter(batch), 'image'))}], b['label']) for b in loader]"
        )
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"of {len(batch)} parts" if isinstance(batch, tuple | list) else shown(batch, 60)
        raise DataError(f"{where} is {what}: batches are pairs (inputs, targets), as in [(b[0], b[1]) for b in loader]")
    inputs, targets = batch
    if not isinstance(inputs, Mapping | tuple | list):
        inputs = _tensor(inputs, f"{where}, inputs")
    if targets is None:  # norms and features have no labels
        return inputs, targets
    targets = _tensor(targets, f"{where}, targets")
    if isinstance(inputs, Tensor) and (not inputs.ndim or not targets.ndim or len(inputs) != len(targets)):
        raise DataError(
            f"{where} has inputs of shape {list(inputs.shape)} and targets of shape {list(targets.shape)}: one target "
            "for each example"
        )
    return inputs, targets


def _tensor(value: Any, where: str) -> Any:
    if isinstance(value, Tensor) or (not isinstance(value, list) and tensors_of(value)):  # a nest is the model's matter
        return value
    try:
        if isinstance(value, str | bytes | Mapping):
            raise TypeError("no numbers")
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} must be a tensor, got {shown(value, 60)}") from error


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:
        return 0
