"""Examples that a function of a person's own gives as batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from fedmerge.data.collating import Batch, as_batch_of
from fedmerge.data.example_sets import USUAL_BATCH, Examples, Rows, length_of, whose
from fedmerge.errors import DataError, FedMergeError

__all__ = ["BatchFunction", "BatchMaker"]

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
