"""What one client holds: its training examples, and those it keeps to test on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.data.example_sets import Examples, TensorExamples
from fedmerge.data.streamed_examples import BatchFunction, DatasetExamples
from fedmerge.errors import DataError, shown

__all__ = ["ClientData", "client_data", "examples_of"]

_FORMS = "ClientData(train_x, train_y, held_out_x, held_out_y) of tensors, or ClientData(train, held_out) of data sets"


class ClientData:
    """The examples of one client; its length is the number of training examples.

    Three forms, of which the last two are read batch by batch and may be larger than memory:

    - tensors, ``ClientData(train_x, train_y, held_out_x, held_out_y)``: NumPy arrays become tensors, class numbers
      int64, labels ``[n, 1]`` become ``[n]``. Inputs may be a tuple or a mapping of tensors;
    - map-style data sets, ``ClientData(train, held_out)``: anything with ``len()`` that gives example i as
      ``train[i]``, with a `collate_fn` where torch's default does not do;
    - functions, ``ClientData(train, held_out)``: ``train(batch_size, generator)`` gives batches of one pass.

    Parameters
    ----------
    train_x, train_y : Tensor
        Training examples `[n, ...]` and labels `[n]` or `[n, T]`. Labels of -100 do not count.
    held_out_x, held_out_y : Tensor
        Examples that the client never trains on; may be empty, or left out.
    train, held_out
        Data sets or functions instead, see :class:`~fedmerge.data.streamed_examples.DatasetExamples` and
        :class:`~fedmerge.data.streamed_examples.BatchFunction`.
    collate_fn
        Makes ``(inputs, targets)`` of a list of a data set's examples.

    Attributes
    ----------
    train, held_out : Examples
        Batches, whatever the form.

    Raises
    ------
    DataError
        Lengths differ, types are none that a model can take, or there are NaN or infinite values: at once in tensors,
        when they are read in a data set.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)
    >>> len(ClientData(x[:4], y[:4], x[4:], y[4:]))
    4
    >>> len(ClientData(torch.utils.data.TensorDataset(x, y)))
    5
    """

    __slots__ = ("held_out", "train")

    train: Examples
    held_out: Examples

    def __init__(
        self,
        train_x: Any = None,
        train_y: Any = None,
        held_out_x: Any = None,
        held_out_y: Any = None,
        *,
        train: Any = None,
        held_out: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if train is None and not _in_memory(train_x, train_y):
            # Two data sets in a row: the second is what is held out.
            if held_out is not None and train_y is not None:
                raise DataError(f"held-out examples are given twice: write {_FORMS}")
            train, train_x = train_x, None
            held_out, train_y = (train_y if held_out is None else held_out), None
        if train is None:
            self.train = TensorExamples(train_x, train_y, "training examples")
        elif train_x is None and train_y is None:
            self.train = examples_of(train, None, "training examples", collate_fn)
        else:
            raise DataError(f"training examples are given twice: write {_FORMS}")
        if held_out_x is None and held_out_y is None:
            self.held_out = (
                _none_of(self.train)
                if held_out is None
                else examples_of(held_out, None, "held-out examples", collate_fn)
            )
        elif held_out is None:
            self.held_out = _held_out(held_out_x, held_out_y, self.train)
        else:
            raise DataError(f"held-out examples are given twice: write {_FORMS}")

    def __len__(self) -> int:
        return len(self.train)

    def __repr__(self) -> str:
        return f"ClientData(train={len(self.train)}, held_out={len(self.held_out)})"

    def trained_on(self, train: Examples) -> ClientData:
        """The same client with other training examples."""
        return ClientData(train=train, held_out=self.held_out)

    def of(self, owner: str) -> ClientData:
        """The same examples, with whose they are in front of errors that come up when they are read."""
        return ClientData(train=self.train.of(owner), held_out=self.held_out.of(owner))

    @property
    def train_x(self) -> Any:
        """Training inputs, where they are in memory."""
        return _tensors(self.train, "train")[0]

    @property
    def train_y(self) -> Tensor:
        """Training labels, where they are in memory."""
        return _tensors(self.train, "train")[1]

    @property
    def held_out_x(self) -> Any:
        """Held-out inputs, where they are in memory."""
        return _tensors(self.held_out, "held_out")[0]

    @property
    def held_out_y(self) -> Tensor:
        """Held-out labels, where they are in memory."""
        return _tensors(self.held_out, "held_out")[1]


def examples_of(
    x: Any, y: Any = None, what: str = "", collate_fn: Callable[[list[Any]], Any] | None = None
) -> Examples:
    """Examples in any form that :class:`ClientData` takes, behind one interface.

    Parameters
    ----------
    x, y
        Inputs and targets as tensors; or in `x` alone a pair of these, a map-style data set, a function of batches, or
        what this function has returned.
    what
        Whose they are, in front of an error.
    collate_fn
        See :class:`ClientData`.

    Raises
    ------
    DataError
        It is none of these.

    Examples
    --------
    >>> len(examples_of([(torch.zeros(2), 0), (torch.ones(2), 1)]))
    2
    """
    front = f"{what}: " if what else ""
    if isinstance(x, Examples) and y is None:
        return x
    pair = isinstance(x, tuple) and len(x) == 2 and y is None and isinstance(x[1], Tensor | np.ndarray)
    if y is not None or isinstance(x, Tensor | np.ndarray | str | bytes | Mapping) or pair:
        if collate_fn is not None:
            raise DataError(f"{front}collate_fn is for data sets, these examples are tensors: leave it out")
        inputs, targets = x if pair else (x, y)
        return TensorExamples(inputs, targets, what)
    if isinstance(x, torch.utils.data.DataLoader):
        raise DataError(
            f"{front}a DataLoader draws batches of its own: pass loader.dataset, and collate_fn=loader.collate_fn"
        )
    if isinstance(x, torch.utils.data.IterableDataset):
        raise DataError(
            f"{front}a {type(x).__name__} is an IterableDataset, whose examples come in one order alone: pass a "
            "map-style data set, or a function batches(batch_size, generator) that gives one pass"
        )
    if hasattr(x, "__getitem__") and not isinstance(x, type):
        return DatasetExamples(x, collate_fn, what)
    if callable(x) and collate_fn is None:
        return BatchFunction(x, what)
    if callable(x):
        raise DataError(f"{front}collate_fn is for data sets, a function gives whole batches: leave it out")
    raise DataError(
        f"{front}got {shown(x, 60)}: pass tensors, a map-style data set (len() and [i]), or a function "
        "batches(batch_size, generator)"
    )


def _in_memory(x: Any, y: Any) -> bool:
    """Whether two arguments are inputs and labels, rather than two data sets."""
    return x is None or isinstance(x, Tensor | np.ndarray) or isinstance(y, Tensor | np.ndarray)


def _none_of(train: Examples) -> Examples:
    """No examples, of the same kind."""
    if train.tensors is None:
        return DatasetExamples([], what="held-out examples")
    inputs, targets = train.first(0) or train.tensors
    return TensorExamples(inputs, targets, "held-out examples")


def _held_out(x: Any, y: Any, train: Examples) -> TensorExamples:
    examples = TensorExamples(x, y, "held-out examples")
    if not len(examples) and train.tensors is not None and not train.tensors[1].is_floating_point():
        examples.y = examples.y.to(torch.int64)
    return examples


def _tensors(examples: Examples, part: str) -> tuple[Any, Tensor]:
    if examples.tensors is None:
        raise DataError(
            f"{examples.what}: they are read batch by batch, not held in tensors: use ClientData.{part}, whose "
            "in_order(batch_size) gives them"
        )
    return examples.tensors


def client_data(data_fn: Callable[[int, int], ClientData], client: int, total: int) -> ClientData:
    """The examples of a client, from whoever has them.

    Raises
    ------
    DataError
        They cannot be used, or are none; the client is named.

    Examples
    --------
    >>> client_data(lambda client, total: torch.zeros(3), 1, 2)
    Traceback (most recent call last):
    ...
    fedmerge.errors.DataError: client 1: data_fn returned a Tensor: return fedmerge.data.ClientData(train_x, train_y, held_out_x, held_out_y), whose last two may be empty (train_x[:0], train_y[:0])
    """  # noqa: E501 - as the error is written
    try:
        data: object = data_fn(client, total)
    except DataError as error:
        raise DataError(f"client {client}: {error}") from error
    if not isinstance(data, ClientData):
        raise DataError(
            f"client {client}: data_fn returned a {type(data).__name__}: return fedmerge.data.ClientData(train_x, "
            "train_y, held_out_x, held_out_y), whose last two may be empty (train_x[:0], train_y[:0])"
        )
    return data.of(f"client {client}")
