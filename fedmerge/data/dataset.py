"""A data set: examples to train on and to test on, in memory or read as they are wanted, and natural clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedmerge.data.client_data import examples_of
from fedmerge.data.example_sets import IGNORED, Examples
from fedmerge.errors import DataError
from fedmerge.inputs import tensors_of

__all__ = ["Dataset"]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Examples, ready for a model: already normalised, and divided into those to train on and those to test on.

    Either tensors (`train_x` to `test_y`), or `train_set` and `test_set` in any form that
    :class:`~fedmerge.data.ClientData` takes, of which only the batch in work is read.

    Parameters
    ----------
    name : str
        Name used in messages and records.
    train_x, test_x : Tensor
        float32 `[n, ...]` (images `[n, channels, height, width]`) or int64 token ids `[n, T]`; or a tuple or mapping of
        tensors `[n, ...]`.
    train_y, test_y : Tensor
        int64 labels `[n]`, or `[n, T]` where each position has one, each in `0 .. num_classes - 1` or -100 where it
        does not count; or float numbers to be regressed on.
    num_classes : int
        Number of classes; 0 in a regression.
    train_client : Tensor, optional
        int64 `[n]`: the natural client that each training example belongs to.
    client_names : tuple of str
        Names of the natural clients, in the order of their numbers.
    class_names : tuple of str
        Names of the classes, or empty.
    train_set, test_set
        Map-style data sets instead of tensors.
    collate_fn
        Makes ``(inputs, targets)`` of a list of their examples.
    labels : Tensor, optional
        int64 `[n]` of a `train_set`, by which it may be divided; else its ``targets`` or one pass over it tell them.
    columns
        What is known of each training example besides: values `[n]` by name, by which it may be divided.
    task : str
        What it is made for, where that is no classification: ``"regression"``, ``"multilabel"``, ...
    outputs : int
        How many outputs a model has for it; by default one for each class, or for each number of a regression.

    Raises
    ------
    DataError
        Where the parts do not fit each other, or tensors hold NaN or infinite values.

    Examples
    --------
    >>> x, y = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])
    >>> Dataset("toy", x, y, x[:2], y[:2], num_classes=2)
    Dataset('toy', train=4, test=2, input_shape=(3,), num_classes=2, natural_clients=0)
    """

    name: str
    train_x: Any = None
    train_y: Any = None
    test_x: Any = None
    test_y: Any = None
    num_classes: int = 0
    train_client: Tensor | None = None
    client_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    train_set: Any = None
    test_set: Any = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    labels: Tensor | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    task: str = ""
    outputs: int = 0
    train: Examples = field(init=False)
    test: Examples = field(init=False)

    def __post_init__(self) -> None:
        for part, x, y, labels in (
            ("training", self.train_x, self.train_y, self.train_set),
            ("test", self.test_x, self.test_y, self.test_set),
        ):
            where = f"data set {self.name!r}, {part} part"
            examples = _examples(x, y, labels, where, self.collate_fn)
            _check_part(where, examples, self.num_classes)
            object.__setattr__(self, "train" if part == "training" else "test", examples)
        # As they were made of what was given: class numbers are int64 now.
        if self.train.tensors is not None:
            object.__setattr__(self, "train_y", self.train.tensors[1])
        if self.train_client is not None:
            _check_clients(self.name, self.train_client, len(self.train), self.client_names)
        for name, values in self.columns.items():
            if len(values) != len(self.train):
                raise DataError(
                    f"data set {self.name!r}, column {name!r}: {len(values)} values for {len(self.train)} training "
                    "examples. Give one for each."
                )
        if not self.outputs:
            object.__setattr__(self, "outputs", self.num_classes or _numbers(self.train))

    @cached_property
    def example(self) -> tuple[Any, Tensor]:
        """Two test examples, as a model is called with them, and their targets."""
        first_two = self.test.first(2)
        assert first_two is not None  # an empty part was refused
        return first_two

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, without the batch axis; of the first input where there are several."""
        inputs = self.train_x if isinstance(self.train_x, Tensor) else self.example[0]
        return tuple(tensors_of(inputs)[0].shape[1:])

    @cached_property
    def train_labels(self) -> Tensor:
        """Labels of all training examples, whether or not these are in memory.

        Raises
        ------
        DataError
            There is no label for each.
        """
        known = self._told_labels
        labels = (
            torch.cat([targets for _, targets in self.train.in_order()]) if known is None else torch.as_tensor(known)
        )
        if len(labels) != len(self.train):
            raise DataError(
                f"data set {self.name!r}: {len(labels)} labels for {len(self.train)} training examples. Give one each."
            )
        return labels

    @property
    def known_labels(self) -> Tensor | None:
        """The same where nobody has to read all examples for them, else None."""
        return self.train_labels if self._told_labels is not None or "train_labels" in vars(self) else None

    @property
    def _told_labels(self) -> Any:
        targets = getattr(self.train_set, "targets", None)  # as torchvision's data sets have them
        return next((labels for labels in (self.train_y, self.labels, targets) if labels is not None), None)

    def tested_on(self, test: Examples) -> Dataset:
        """The same with another test part."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("train", "test")}
        if test.tensors is not None:
            x, y = test.tensors
            return Dataset(**{**fields, "test_x": x, "test_y": y, "test_set": None})
        return Dataset(**{**fields, "test_x": None, "test_y": None, "test_set": test})

    def only(self, rows: Tensor) -> Dataset:
        """The same with these training examples alone, by their rows, int64 [n]."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("train", "test")}
        numbers = rows.tolist()
        fields["columns"] = {name: [values[i] for i in numbers] for name, values in self.columns.items()}
        fields["train_client"] = None if self.train_client is None else self.train_client[rows]
        train = self.train.subset(rows)
        if train.tensors is not None:
            x, y = train.tensors
            return Dataset(**{**fields, "train_x": x, "train_y": y, "train_set": None, "labels": None})
        labels = None if self._told_labels is None else self.train_labels[rows]
        return Dataset(**{**fields, "train_x": None, "train_y": None, "train_set": train, "labels": labels})

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}, train={len(self.train)}, test={len(self.test)}, "
            f"input_shape={self.input_shape}, num_classes={self.num_classes}, "
            f"natural_clients={len(self.client_names)})"
        )


def _examples(x: Any, y: Any, data: Any, where: str, collate_fn: Callable[[list[Any]], Any] | None) -> Examples:
    if data is None and x is None:
        raise DataError(f"{where}: it is missing. Give examples to train on and examples to test on.")
    if data is not None and x is not None:
        raise DataError(f"{where}: it is given twice, as tensors and as a data set. Leave one out.")
    if data is not None:
        in_memory = isinstance(data, Examples) and data.tensors is not None
        return examples_of(data, None, where, None if in_memory else collate_fn)
    return examples_of(x, y, where)


def _check_part(where: str, examples: Examples, num_classes: int) -> None:
    if len(examples) == 0:
        raise DataError(f"{where}: no examples. Use a larger source, or options that leave some.")
    if examples.tensors is None:
        examples.first(1)  # what cannot be read is better told now than in the middle of a round
        return
    y = examples.tensors[1]
    if y.is_floating_point():
        if num_classes:
            raise DataError(f"{where}: labels are {y.dtype}. Convert them to torch.int64, or leave num_classes at 0.")
        return
    counted = y[y != IGNORED]
    if not num_classes or not len(counted):
        return
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"{where}: labels run from {low} to {high}, outside 0..{num_classes - 1}. Check the files and num_classes."
        )


def _numbers(examples: Examples) -> int:
    """Numbers of an example's target."""
    inputs = examples.first(1)
    return 1 if inputs is None else max(1, inputs[1][:1].numel())


def _check_clients(name: str, train_client: Tensor, examples: int, client_names: tuple[str, ...]) -> None:
    where = f"data set {name!r}, train_client"
    if train_client.shape != (examples,) or train_client.dtype != torch.int64:
        raise DataError(
            f"{where}: {train_client.dtype} of shape {list(train_client.shape)}. "
            f"Give one int64 client number for each of the {examples} training examples."
        )
    low, high = int(train_client.min()), int(train_client.max())
    if low < 0 or high >= len(client_names):
        raise DataError(
            f"{where}: clients run from {low} to {high}, but client_names has {len(client_names)} entries. "
            "Give a name for each."
        )
