"""Examples read batch by batch: of a data set, of a function that gives batches, or changed as they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from fedmerge.data.collating import as_batch_of, collated, read_rows
from fedmerge.data.example_sets import USUAL_BATCH, Batch, Examples, Rows, whose
from fedmerge.errors import DataError, FedMergeError

__all__ = ["BatchFunction", "BatchMaker", "ChangedExamples", "DatasetExamples", "length_of"]

BatchMaker = Callable[[int, np.random.Generator | None], Iterable[Any]]
"""``batches(batch_size, generator)``: one pass over the examples; in an order of its own choice where there is no
generator, the same every time."""


class BatchFunction(Examples):
    """Examples that a function gives as batches.

    Parameters
    ----------
    function
        ``batches(batch_size, generator)`` gives ``(inputs, targets)`` for one pass over the examples: in an order drawn
        from the :class:`numpy.random.Generator`, or in a fixed one where it is None. Where it has a ``len()``, that is
        the number of examples; else a first pass counts them.
    what
        Whose they are, in front of an error.

    Examples
    --------
    >>> import torch
    >>> def numbers(batch_size, generator):
    ...     order = np.arange(5) if generator is None else generator.permutation(5)
    ...     for start in range(0, 5, batch_size):
    ...         rows = torch.from_numpy(order[start : start + batch_size])
    ...         yield rows[:, None].float(), rows % 2
    >>> mine = BatchFunction(numbers)
    >>> len(mine), [y.tolist() for x, y in mine.in_order(3)]
    (5, [[0, 1, 0], [1, 0]])
    """

    def __init__(self, function: BatchMaker, what: str = "") -> None:
        self.function, self.what = function, what

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        if hasattr(self.function, "__len__"):
            return length_of(self.function, self.what)
        return sum(len(targets) for _, targets in self.in_order())

    def take(self, rows: Rows) -> Batch:
        """Not to be had.

        Raises
        ------
        DataError
            Always.
        """
        raise DataError(
            f"{whose(self.what)}a function gives batches in its own order, single examples cannot be asked for: pass "
            "a map-style data set"
        )

    def drawn(
        self,
        batch_size: int,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        generator: np.random.Generator,
    ) -> Iterator[Batch]:
        """As many passes as that takes, each drawn anew from `generator`."""
        taken = passes = 0
        while (epochs is None or passes < epochs) and (steps is None or taken < steps):
            before = taken
            for batch in self._pass(batch_size, generator):
                yield batch
                taken += 1
                if taken == steps:
                    return
            passes += 1
            if taken == before:
                raise DataError(f"{whose(self.what)}the function of batches gave none in pass {passes} of training")

    def in_order(self, batch_size: int = USUAL_BATCH) -> Iterator[Batch]:
        """One pass without a generator."""
        return self._pass(batch_size, None)

    def first(self, number: int = 2) -> Batch | None:
        """The first batch of one pass of batches of this size."""
        return next(self.in_order(number), None)

    def _pass(self, batch_size: int, generator: np.random.Generator | None) -> Iterator[Batch]:
        try:
            for batch in self.function(batch_size, generator):
                yield as_batch_of(batch, self.what)
        except FedMergeError:
            raise
        except Exception as error:  # a person's own function may raise anything
            raise DataError(
                f"{whose(self.what)}the function of batches fails ({type(error).__name__}: {error}); it is called as "
                "batches(batch_size, generator) and gives pairs (inputs, targets)"
            ) from error


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
    >>> import torch
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
        rows_read = read_rows(self.dataset, rows.tolist(), self.what)
        try:
            batch = collated(rows_read) if self.collate_fn is None else self.collate_fn(rows_read)
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
    >>> import torch
    >>> from fedmerge.data.example_sets import TensorExamples
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
