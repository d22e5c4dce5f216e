"""Examples in any form behind one small interface: how many there are, batches to train on, batches to measure on.

Everything that trains, judges or measures asks for batches here and never for tensors, so that examples that do not fit
into memory are read when their batch is due and forgotten after it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.data.collating import Batch
from fedmerge.data.examples import checked_examples
from fedmerge.errors import DataError, InvalidOption
from fedmerge.inputs import changed

__all__ = [
    "USUAL_BATCH",
    "Examples",
    "TensorExamples",
    "batch_indices",
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
        """Batches for training, see :func:`batch_indices`."""
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


def batch_indices(
    n: int,
    batch_size: int,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    generator: np.random.Generator,
) -> Iterator[NDArray[np.int64]]:
    """Draw the batches of a number of epochs, or of a number of steps.

    Each epoch is a fresh permutation of the `n` examples; its last batch may be smaller.

    Parameters
    ----------
    n : int
        Number of examples, at least 1.
    batch_size : int
        Examples in a batch, at least 1.
    epochs, steps : int, optional
        Exactly one of them: passes over the examples, or batches in all (over as many epochs as that takes).
    generator : numpy.random.Generator
        Source of the permutations, advanced as batches are drawn.

    Yields
    ------
    numpy.ndarray
        int64 `[b]` with `1 <= b <= batch_size`: positions among the `n` examples.

    Raises
    ------
    InvalidOption
        At the call, where a number is out of range, or both or none of `epochs` and `steps` are given.

    Examples
    --------
    >>> batches = batch_indices(5, 2, epochs=1, generator=np.random.default_rng(0))
    >>> [len(batch) for batch in batches]
    [2, 2, 1]
    """
    if n < 1:
        raise InvalidOption(f"n={n}: there are no examples to draw batches from. Give at least 1.")
    if batch_size < 1:
        raise InvalidOption(f"batch_size={batch_size}: must be at least 1.")
    if (epochs is None) == (steps is None):
        raise InvalidOption(f"epochs={epochs} and steps={steps}: give exactly one of them.")
    if min(epochs or 0, steps or 0) < 0:
        raise InvalidOption(f"epochs={epochs}, steps={steps}: must not be negative.")
    passes = count() if epochs is None else range(epochs)
    # Lazy, so that a generator shared with other draws advances batch by batch.
    batches = (
        order[start : start + batch_size]
        for order in (generator.permutation(n) for _ in passes)
        for start in range(0, n, batch_size)
    )
    return islice(batches, steps)


def whose(what: str) -> str:
    """Whose examples an error is about, to stand in front of it."""
    return f"{what}: " if what else ""
