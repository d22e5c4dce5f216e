"""Examples in any form behind one small interface: how many there are, batches to train on, batches to measure on.

Everything that trains, judges or measures asks for batches here and never for tensors, so that examples that do not fit
into memory are read when their batch is due and forgotten after it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset

from fedmerge.data.batches import batch_indices
from fedmerge.data.collating import Batch, as_batch_of, collated, read_rows
from fedmerge.data.examples import checked_examples
from fedmerge.errors import DataError, FedMergeError
from fedmerge.inputs import changed

__all__ = [
    "USUAL_BATCH",
    "ChangedExamples",
    "DatasetExamples",
    "Examples",
    "TensorExamples",
    "length_of",
    "whose",
]

Rows = NDArray[np.int64]

USUAL_BATCH = 512
"""Examples in a batch that is measured or judged, unless somebody asks for another number."""


class Examples(ABC):
    """Examples that can be read in batches; ``len()`` is how many there are.

    Subclasses say how rows are read (:meth:`take`); which rows make up a batch is decided here, by the same draws for
    all of them.

    Examples
    --------
    >>> mine: Examples = TensorExamples(torch.zeros(5, 2), torch.tensor([0, 1, 0, 1, 0]))
    >>> [y.tolist() for x, y in mine.drawn(2, epochs=1, generator=np.random.default_rng(0))]
    [[0, 0], [1, 0], [1]]
    """

    what: str = ""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, rows: Rows) -> Batch:
        """Inputs and targets of these rows, numbered from 0."""

    @property
    def tensors(self) -> tuple[Any, Tensor] | None:
        """Inputs and targets of all examples where they are in memory, None where they are read batch by batch."""
        return None

    def drawn(
        self,
        batch_size: int,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        generator: np.random.Generator,
    ) -> Iterator[Batch]:
        """Batches for training, see :func:`~fedmerge.data.batches.batch_indices`."""
        for rows in batch_indices(len(self), batch_size, epochs=epochs, steps=steps, generator=generator):
            yield self.take(rows)

    def in_order(self, batch_size: int = USUAL_BATCH) -> Iterator[Batch]:
        """All examples, always in the same order, for measuring and judging."""
        for start in range(0, len(self), batch_size):
            yield self.take(np.arange(start, min(start + batch_size, len(self))))

    def first(self, number: int = 2) -> Batch | None:
        """The first examples, to show what they look like; None where there are none."""
        return self.take(np.arange(min(number, len(self)))) if len(self) else None

    def subset(self, rows: Tensor) -> Examples:
        """Some of the examples, by their numbers.

        Raises
        ------
        DataError
            They cannot be divided.
        """
        raise DataError(
            f"{whose(self.what)}a function gives batches of all examples, which cannot be divided: return a map-style "
            "data set"
        )

    def of(self, owner: str) -> Examples:
        """The same examples, with whose they are in front of errors."""
        twin = copy.copy(self)
        twin.what = f"{owner}: {self.what}"
        return twin


class TensorExamples(Examples):
    """Examples in memory.

    Parameters
    ----------
    x, y
        Inputs [n, ...], or a tuple or mapping of such tensors, and targets [n, ...], as
        :func:`~fedmerge.data.examples.checked_examples` takes them.
    what
        Whose they are, in front of an error.

    Examples
    --------
    >>> mine = TensorExamples(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0]))
    >>> [len(targets) for inputs, targets in mine.in_order(2)]
    [2, 1]
    """

    def __init__(self, x: Any, y: Any, what: str = "") -> None:
        self.x, self.y = checked_examples(x, y, what)
        self.what = what

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Rows) -> Batch:
        """Copies of these rows."""
        return self._at(torch.from_numpy(rows))

    @property
    def tensors(self) -> tuple[Any, Tensor]:
        """All of them."""
        return self.x, self.y

    def in_order(self, batch_size: int = USUAL_BATCH) -> Iterator[Batch]:
        """Views of the tensors."""
        for start in range(0, len(self), batch_size):
            yield self._at(slice(start, start + batch_size))

    def first(self, number: int = 2) -> Batch | None:
        """Views of the first rows; of none too, which tell shapes and types."""
        return self._at(slice(number))

    def subset(self, rows: Tensor) -> Examples:
        """Copies of these rows."""
        twin = copy.copy(self)
        twin.x, twin.y = self._at(rows)
        return twin

    def _at(self, index: slice | Tensor) -> Batch:
        if isinstance(self.x, Tensor):
            return self.x[index], self.y[index]
        return changed(self.x, lambda tensor: tensor[index]), self.y[index]


class DatasetExamples(Examples):
    """Examples that a map-style data set reads one by one, each time that a batch of them is due.

    Parameters
    ----------
    dataset
        Has ``len()`` and gives example i as ``dataset[i]``, or several as ``dataset.__getitems__(rows)``.
    collate_fn
        Makes ``(inputs, targets)`` of a list of examples. Where not given, see
        :func:`~fedmerge.data.collating.collated`.
    what
        Whose they are, in front of an error.

    Examples
    --------
    >>> pairs = torch.utils.data.TensorDataset(torch.arange(3.0)[:, None], torch.tensor([0, 1, 0]))
    >>> DatasetExamples(pairs).take(np.array([2, 1]))[1]
    tensor([0, 1])
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] | None = None, what: str = "") -> None:
        self.dataset, self.collate_fn, self.what = dataset, collate_fn, what
        self._length = length_of(dataset, what)

    def __len__(self) -> int:
        return self._length

    def take(self, rows: Rows) -> Batch:
        """These rows, read now.

        Raises
        ------
        DataError
            One cannot be read, they do not make a batch, or one holds NaN or infinite values.
        """
        found = read_rows(self.dataset, rows.tolist(), self.what)
        try:
            batch = collated(found) if self.collate_fn is None else self.collate_fn(found)
        except FedMergeError:
            raise
        except Exception as error:  # a person's own function may raise anything
            own = "the default collation" if self.collate_fn is None else "collate_fn"
            raise DataError(
                f"{whose(self.what)}{own} makes no batch of {len(rows)} examples ({type(error).__name__}: {error}). "
                "Give all examples the same shape, or pass a collate_fn that makes (inputs, targets) of a list"
            ) from error
        return as_batch_of(batch, self.what, rows)

    def subset(self, rows: Tensor) -> Examples:
        """The same data set, of which only these rows will be read."""
        return DatasetExamples(Subset(self.dataset, rows.tolist()), self.collate_fn, self.what)


class ChangedExamples(Examples):
    """Other examples, each batch changed as it is read: how attacks poison what does not fit into memory.

    Parameters
    ----------
    examples
        The examples.
    change
        ``change(inputs, targets, rows)`` makes the batch that is seen instead; `rows` says which examples these are.

    Examples
    --------
    >>> honest = TensorExamples(torch.zeros(3, 1), torch.tensor([0, 1, 0]))
    >>> ChangedExamples(honest, lambda x, y, rows: (x, 1 - y)).take(np.array([0, 1]))[1]
    tensor([1, 0])
    """

    def __init__(self, examples: Examples, change: Callable[[Any, Tensor, Rows], Batch]) -> None:
        self.examples, self.change, self.what = examples, change, examples.what

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, rows: Rows) -> Batch:
        """These rows, changed."""
        return self.change(*self.examples.take(rows), rows)

    def of(self, owner: str) -> Examples:
        """The same examples, with whose they are in front of errors."""
        return ChangedExamples(self.examples.of(owner), self.change)


def length_of(dataset: Any, what: str) -> int:
    """How many examples a person's own data set says that it has.

    Raises
    ------
    DataError
        It does not say.
    """
    try:
        return len(dataset)
    except Exception as error:  # a person's own data set may raise anything
        raise DataError(
            f"{whose(what)}the number of examples of a {type(dataset).__name__} cannot be had "
            f"({type(error).__name__}: {error}): give it a __len__ that returns a whole number"
        ) from error


def whose(what: str) -> str:
    """Whose examples an error is about, to stand in front of it."""
    return f"{what}: " if what else ""
