"""The division of a data set among clients: which rows each trains on, and which it holds out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fedmerge.data.client_data import ClientData
from fedmerge.data.dataset import Dataset
from fedmerge.data.own_division import own_division
from fedmerge.data.partition_checks import check_enough_examples, check_possible, column_of
from fedmerge.data.partition_settings import PartitionSettings
from fedmerge.data.partitioners import assign_rows
from fedmerge.errors import DataError, FedMergeError, InvalidOption, PartitionError, RecordError

__all__ = ["Partition", "PartitionSettings", "make_partition"]


@dataclass(frozen=True, eq=False)
class Partition:
    """Who has which rows of a data set.

    Parameters
    ----------
    settings : PartitionSettings
        What it was made from.
    seed : int
        What it was drawn with.
    train, held_out : tuple of Tensor
        For each client, sorted int64 rows of `dataset.train_x`; no row is in two of these tensors.
    client_names : tuple of str
        A name for each client.

    Examples
    --------
    >>> rows = (torch.tensor([0, 2]), torch.tensor([1])), (torch.tensor([3]), torch.tensor([], dtype=torch.int64))
    >>> partition = Partition(PartitionSettings("iid", clients=2), 0, *rows, ("a", "b"))
    >>> partition.label_counts(torch.tensor([0, 1, 1, 1]), num_classes=2).tolist()
    [[1, 1], [0, 1]]
    >>> Partition.from_tensors(partition.to_tensors()).client_names
    ('a', 'b')
    """

    settings: PartitionSettings
    seed: int
    train: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    client_names: tuple[str, ...]

    def client_data(self, dataset: Dataset, client: int) -> ClientData:
        """Examples of one client: copied out of tensors, or to be read from a data set when they are wanted.

        Raises
        ------
        PartitionError
            Where there is no such client, or `dataset` is smaller than the one that was divided.
        """
        if not 0 <= client < len(self.train):
            raise PartitionError(f"client {client} is not in this partition. Use 0..{len(self.train) - 1}.")
        train, held_out = self.train[client], self.held_out[client]
        highest = max((int(rows.max()) for rows in (train, held_out) if len(rows) > 0), default=-1)
        if highest >= len(dataset.train):
            raise PartitionError(
                f"client {client} has row {highest}, but data set {dataset.name!r} has "
                f"{len(dataset.train)} training examples. Use the data set that the partition was made from."
            )
        return ClientData(train=dataset.train.subset(train), held_out=dataset.train.subset(held_out))

    def label_counts(self, labels: Tensor, num_classes: int) -> Tensor:
        """Count each client's training labels.

        Parameters
        ----------
        labels : Tensor
            int64 `[n]` or `[n, T]`: `dataset.train_y`.
        num_classes : int
            `dataset.num_classes`.

        Returns
        -------
        Tensor
            int64 `[clients, num_classes]`.

        Raises
        ------
        DataError
            Where a label is outside `0 .. num_classes - 1`.
        """
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise DataError(
                f"labels run from {low} to {high}, outside 0..{num_classes - 1}. Raise num_classes to {high + 1}."
            )
        return torch.stack([torch.bincount(labels[rows].flatten(), minlength=num_classes) for rows in self.train])

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything in this partition as tensors, to be stored as safetensors.

        Rows of all clients stand in one tensor; offsets `[clients + 1]` say where each client's begin and end.
        Settings, seed and names are JSON as bytes.
        """
        about = {"settings": asdict(self.settings), "seed": self.seed, "client_names": self.client_names}
        return {
            **_flat("train", self.train),
            **_flat("held_out", self.held_out),
            "about": torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Partition:
        """Rebuild the partition that `to_tensors` took apart.

        Raises
        ------
        RecordError
            Where a tensor is missing or they do not fit each other.
        """
        try:
            about = json.loads(bytes(tensors["about"].tolist()))
            settings, seed = PartitionSettings(**about["settings"]), int(about["seed"])
            train, held_out = _nested("train", tensors), _nested("held_out", tensors)
            names = tuple(about["client_names"])
            if not all(isinstance(name, str) for name in names):
                raise TypeError("client_names are no texts")
            if not len(train) == len(held_out) == len(names):
                raise ValueError(f"{len(train)} and {len(held_out)} clients, {len(names)} names")
        except (
            AttributeError,
            LookupError,
            OverflowError,
            TypeError,
            ValueError,
            RuntimeError,
            FedMergeError,
        ) as error:
            raise RecordError(
                f"not the tensors of a partition ({type(error).__name__}: {error}). "
                "Store again what to_tensors() returns."
            ) from error
        return cls(settings, seed, train, held_out, names)


def make_partition(
    dataset: Dataset, settings: PartitionSettings, seed: int, withheld: Tensor | None = None
) -> Partition:
    """Divide the training examples of a data set among clients.

    Parameters
    ----------
    dataset : Dataset
        What to divide.
    settings : PartitionSettings
        How to divide it.
    seed : int
        At least 0. The same seed gives the same partition, another seed another one.
    withheld : Tensor, optional
        int64 rows that no client gets: the others are divided as if they were the whole data set.

    Raises
    ------
    PartitionError
        Where the data set cannot be divided like this; the message says what to change.
    InvalidOption
        For a negative seed.
    DataError
        Where flwr-datasets is not installed.

    Examples
    --------
    >>> from fedmerge.data import load_dataset
    >>> partition = make_partition(load_dataset("digits"), PartitionSettings("iid", clients=4), seed=0)
    >>> [len(rows) for rows in partition.train], [len(rows) for rows in partition.held_out]
    ([324, 323, 323, 323], [36, 36, 36, 36])
    """
    if not isinstance(seed, int) or seed < 0:
        raise InvalidOption(f"partition seed={seed!r}: must be an integer of at least 0.")
    if withheld is not None and len(withheld):
        free = torch.ones(len(dataset.train), dtype=torch.bool)
        free[withheld] = False
        left = free.nonzero().flatten()
        if not len(left):
            raise PartitionError(f"all training examples of data set {dataset.name!r} are withheld: leave clients some")
        part = make_partition(dataset.only(left), settings, seed)
        return replace(
            part, train=tuple(left[rows] for rows in part.train), held_out=tuple(left[rows] for rows in part.held_out)
        )
    check_possible(dataset, settings)
    assign, keep = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    if settings.own:
        names, parts = own_division(dataset, settings, assign)
    else:
        clients, key, names = _plan(dataset, settings)
        parts = assign_rows(len(dataset.train), key, settings, clients, assign)
    train, held_out = [], []
    for rows in parts:
        kept = keep.permutation(rows)[: settings.max_examples]
        tested = settings.held_out_of(len(kept))
        held_out.append(torch.from_numpy(np.sort(kept[:tested])))
        train.append(torch.from_numpy(np.sort(kept[tested:])))
    check_enough_examples([len(rows) for rows in train], names, settings, seed)
    return Partition(settings, seed, tuple(train), tuple(held_out), names)


def _plan(dataset: Dataset, settings: PartitionSettings) -> tuple[int, Tensor | None, tuple[str, ...]]:
    """Number of clients, what to divide by, and the clients' names."""
    if settings.scheme == "natural":
        names = dataset.client_names[: settings.clients]
        return len(names), dataset.train_client, names
    if settings.scheme == "column":
        values, numbers = np.unique(column_of(dataset, settings), return_inverse=True)
        names = tuple(map(str, values.tolist()))[: settings.clients]
        return len(names), torch.from_numpy(numbers.reshape(-1)), names
    clients = settings.clients or 0
    key = None if settings.scheme in ("iid", "quantity") else dataset.train_labels
    return clients, key, tuple(f"client-{client}" for client in range(clients))


def _flat(name: str, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    lengths = torch.tensor([0, *(len(rows) for rows in parts)])
    return {f"{name}_rows": torch.cat(list(parts)), f"{name}_offsets": lengths.cumsum(0)}


def _nested(name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    rows, offsets = tensors[f"{name}_rows"], tensors[f"{name}_offsets"]
    if rows.dtype != torch.int64 or offsets.dtype != torch.int64 or rows.ndim != 1 or offsets.ndim != 1:
        raise TypeError(f"{name}: want int64 vectors, got {rows.dtype} {list(rows.shape)} and {offsets.dtype}")
    if len(rows) and int(rows.min()) < 0:
        raise ValueError(f"{name}_rows has negative rows")
    if offsets[0] != 0 or offsets[-1] != len(rows) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{name}_offsets {offsets.tolist()[:5]} do not fit {len(rows)} rows")
    # Clones, since a view would keep every other client's rows alive.
    return tuple(rows[start:end].clone() for start, end in pairwise(offsets.tolist()))
