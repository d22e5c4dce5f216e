"""A data set in memory: training and test examples, labels, and natural clients where it has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.errors import DataError

__all__ = ["Dataset"]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Examples, ready for a model: already normalised, one tensor for all.

    Parameters
    ----------
    name : str
        Name used in messages and records.
    train_x, test_x : Tensor
        float32 `[n, ...]` (images `[n, channels, height, width]`) or int64 token ids `[n, T]`.
    train_y, test_y : Tensor
        int64 labels `[n]`, or `[n, T]` where each position has one; each in `0 .. num_classes - 1`.
    num_classes : int
        Number of classes.
    train_client : Tensor, optional
        int64 `[n]`: the natural client that each training example belongs to.
    client_names : tuple of str
        Names of the natural clients, in the order of their numbers.
    class_names : tuple of str
        Names of the classes, or empty.

    Raises
    ------
    DataError
        Where the tensors do not fit each other.

    Examples
    --------
    >>> x, y = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])
    >>> Dataset("toy", x, y, x[:2], y[:2], num_classes=2)
    Dataset('toy', train=4, test=2, input_shape=(3,), num_classes=2, natural_clients=0)
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    train_client: Tensor | None = None
    client_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_part(self.name, "training", self.train_x, self.train_y, self.num_classes)
        _check_part(self.name, "test", self.test_x, self.test_y, self.num_classes)
        if self.train_client is not None:
            _check_clients(self.name, self.train_client, len(self.train_y), self.client_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, without the batch axis."""
        return tuple(self.train_x.shape[1:])

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}, train={len(self.train_x)}, test={len(self.test_x)}, "
            f"input_shape={self.input_shape}, num_classes={self.num_classes}, "
            f"natural_clients={len(self.client_names)})"
        )


def _check_part(name: str, part: str, x: Tensor, y: Tensor, num_classes: int) -> None:
    where = f"data set {name!r}, {part} part"
    if len(x) != len(y):
        raise DataError(f"{where}: {len(x)} examples but {len(y)} labels. Give each example one label.")
    if len(x) == 0:
        raise DataError(f"{where}: no examples. Use a larger source, or options that leave some.")
    if y.dtype != torch.int64:
        raise DataError(f"{where}: labels are {y.dtype}. Convert them to torch.int64.")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"{where}: labels run from {low} to {high}, outside 0..{num_classes - 1}. Check the files and num_classes."
        )


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
