"""Examples in any form behind one small interface: how many there are, batches to train on, batches to measure on.

Everything that trains, judges or measures asks for batches here and never for tensors, so that examples that do not fit
into memory are read when their batch is due and forgotten after it. Tensors are checked when they are handed over: what
they mean is certain then, or they are refused in words.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.errors import DataError
from fedmerge.inputs import changed
from fedmerge.seeding import batch_indices

__all__ = ["IGNORED", "USUAL_BATCH", "Examples", "TensorExamples", "as_tensor", "checked_examples", "whose"]

Batch = tuple[Any, Tensor]
"""Inputs in any form, and targets [b, ...]."""
Rows = NDArray[np.int64]

USUAL_BATCH = 512
"""Examples in a batch that is measured or judged, unless somebody asks for another number."""

IGNORED = -100
"""The label that does not count: that of padding, as in ``torch.nn.functional.cross_entropy``."""

# An axis of one position: sequences of tokens, or of features.
_MOST_AXES_OF_SEQUENCES = 3


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
        """Batches for training, see :func:`~fedmerge.seeding.batch_indices`."""
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
        :func:`~fedmerge.data.example_sets.checked_examples` takes them.
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


def whose(what: str) -> str:
    """Whose examples an error is about, to stand in front of it."""
    return f"{what}: " if what else ""


def checked_examples(x: Any, y: Any, what: str = "", rows: NDArray[np.int64] | None = None) -> tuple[Any, Tensor]:
    """Inputs and labels as training takes them.

    NumPy arrays become tensors (of float64 the default dtype), whole numbers and booleans as labels become int64, and
    labels ``[n, 1]`` become ``[n]``. Labels with fractions stay: whether they are right is a matter of the loss.

    Parameters
    ----------
    x
        Inputs [n, ...], or a tuple or mapping of such tensors, as the model is called with them.
    y
        Labels [n, ...].
    what
        Whose they are, in front of an error.
    rows
        Their numbers in a larger data set, where they are a batch of it.

    Raises
    ------
    DataError
        They are neither tensors nor arrays of numbers, differ in length, or hold NaN or infinite values.

    Examples
    --------
    >>> x, y = checked_examples(np.zeros((2, 3)), np.array([[0], [1]], dtype=np.uint8))
    >>> x.dtype, y
    (torch.float32, tensor([0, 1]))
    """
    what = f"{what}: " if what else ""
    labels = as_tensor(y, f"{what}labels")
    inputs = _inputs(x, labels, f"{what}inputs", rows)
    _check_finite(labels, f"{what}labels", rows)
    if labels.is_complex():
        raise DataError(f"{what}labels are complex numbers: pass class numbers, int64")
    if not labels.is_floating_point():
        labels = labels.long()
        if labels.ndim > 1 and labels.shape[1:].numel() == 1 and not _one_position(inputs):
            labels = labels.flatten()
    return inputs, labels


def _inputs(x: Any, labels: Tensor, what: str, rows: NDArray[np.int64] | None) -> Any:
    """Inputs in the form that they have, each tensor of them checked."""
    if isinstance(x, Mapping) and len(x):
        return {key: _inputs(part, labels, f"{what} {key!r}", rows) for key, part in x.items()}
    if isinstance(x, tuple) and len(x):
        return tuple(_inputs(part, labels, f"{what}[{i}]", rows) for i, part in enumerate(x))
    inputs = as_tensor(x, what)
    if inputs.ndim == 0 or labels.ndim == 0 or len(inputs) != len(labels):
        raise DataError(
            f"{what} have shape {list(inputs.shape)}, labels {list(labels.shape)}: give each example a label, "
            "both with examples on the first axis"
        )
    _check_finite(inputs, what, rows)
    return inputs


def _one_position(inputs: Any) -> bool:
    """Whether inputs may be sequences of length 1, whose labels [n, 1] are what they should be."""
    if not isinstance(inputs, Tensor):
        return True  # who hands over several tensors knows what the model makes of each
    return 1 < inputs.ndim <= _MOST_AXES_OF_SEQUENCES and inputs.shape[1] == 1


def as_tensor(value: Any, what: str) -> Tensor:
    """A tensor as it is, a NumPy array as one.

    Raises
    ------
    DataError
        It is something else.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise DataError(f"{what} are a sparse tensor: pass tensor.to_dense()")
        return value
    if not isinstance(value, np.ndarray):
        raise DataError(
            f"{what} are a {type(value).__name__}: pass a tensor or a NumPy array with examples on the first axis, "
            "such as torch.stack(list_of_tensors) or frame.to_numpy()"
        )
    if value.dtype.kind not in "biufc":
        raise DataError(f"{what} are an array of {value.dtype}: pass numbers, texts and classes as their numbers")
    if value.dtype.kind == "u" and value.dtype.itemsize > 1:
        value = value.astype(np.int64)  # torch hardly calculates with them
    tensor = torch.from_numpy(value.copy() if not value.flags.writeable or min(value.strides, default=0) < 0 else value)
    # NumPy has float64 where nobody asked for anything, models have torch's default.
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def _check_finite(tensor: Tensor, what: str, numbers: NDArray[np.int64] | None) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.sum().isfinite()):
        return  # a finite sum has finite terms
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        rows = bad.reshape(len(bad), -1).any(1).nonzero().flatten()
        kind = "NaN" if bool(tensor.isnan().any()) else "infinite values"
        first = int(rows[0]) if numbers is None else int(numbers[int(rows[0])])
        raise DataError(
            f"{what} hold {kind}, in {len(rows)} of {len(bad)} examples, first in example {first}: leave these "
            "out, or fill them in (torch.nan_to_num)"
        )
