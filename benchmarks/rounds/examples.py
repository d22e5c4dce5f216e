"""Which examples each client holds: real ones where they lie on this machine, else made up in the same shapes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.rounds.workloads import Workload
from fedmerge.data import ClientData, Dataset, load_dataset
from fedmerge.seeding import generator, torch_generator

__all__ = ["ClientRows", "load_examples"]

_FOLDERS = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}
_CONCENTRATION = 0.5


# One entry: a process works on one workload at a time, and data sets are large.
@lru_cache(maxsize=1)
def load_examples(name: str, data_dir: Path | None, device: str = "cpu") -> Dataset:
    """The data set, on `device`; named ``"synthetic"`` where its files are not to be had. Nothing is downloaded.

    Raises
    ------
    DataError
        The folder does not exist, or its files are damaged.
    """
    examples = load_dataset(name, data_dir) if _available(name, data_dir) else _synthetic(name)
    if device == "cpu":
        return examples
    moved = {part: getattr(examples, part).to(device) for part in ("train_x", "train_y", "test_x", "test_y")}
    return replace(examples, **moved)


def _available(name: str, data_dir: Path | None) -> bool:
    if name not in _FOLDERS:
        return True  # ships with a library
    folder = Path(data_dir or os.environ.get("FEDMERGE_DATA") or Path.home() / ".cache" / "fedmerge").expanduser()
    # A folder that somebody named and that is not there is a mistake, which the loader explains.
    named = data_dir is not None and not folder.is_dir()
    return named or any((folder / _FOLDERS[name]).glob("train-images-idx3-ubyte*"))


def _synthetic(name: str) -> Dataset:
    """Ten classes with a mean each and noise around it, as many and as large as MNIST's."""
    draw = torch_generator(0, f"synthetic {name}")
    means = torch.randn(10, 1, 28, 28, generator=draw)
    labels = torch.randint(0, 10, (70_000,), generator=draw)
    inputs = torch.randn(70_000, 1, 28, 28, generator=draw).mul_(2).add_(means[labels])
    return Dataset("synthetic", inputs[:60_000], labels[:60_000], inputs[60_000:], labels[60_000:], 10)


@dataclass(frozen=True)
class ClientRows:
    """Gives a client its examples; travels to workers as settings, not as tensors.

    Examples
    --------
    >>> from benchmarks.rounds.workloads import Workload
    >>> data = ClientRows(Workload("tiny", "digits", 10**9, 1, 20, "drawn", (8,), 10, 0.1, 2), None, 0, "cpu")
    >>> data(999_999_999, 10**9).train_x.shape
    torch.Size([20, 1, 8, 8])
    """

    workload: Workload
    data_dir: Path | None
    seed: int
    device: str

    def __call__(self, partition_id: int, num_partitions: int) -> ClientData:
        """The examples of one client; nothing is done for any other."""
        data = load_examples(self.workload.dataset, self.data_dir, self.device)
        rows = torch.from_numpy(self._rows(partition_id, data))
        x, y = data.train_x[rows], data.train_y[rows]
        return ClientData(x, y, x[:0], y[:0])

    def _rows(self, client: int, data: Dataset) -> NDArray[np.int64]:
        workload, total = self.workload, len(data.train_y)
        if workload.division == "drawn":
            return generator(self.seed, "bench rows", client).integers(total, size=workload.examples)
        if workload.division == "dirichlet":
            return _dealt_by_label(workload, self.data_dir, self.seed, self.device)[client]
        start = client * workload.examples
        return _shuffled(total, self.seed)[start : start + workload.examples]


@lru_cache(maxsize=1)
def _shuffled(total: int, seed: int) -> NDArray[np.int64]:
    return generator(seed, "partition").permutation(total)


@lru_cache(maxsize=1)
def _dealt_by_label(workload: Workload, data_dir: Path | None, seed: int, device: str) -> list[NDArray[np.int64]]:
    """Rows of every client, each class divided by a Dirichlet draw.

    With numpy alone: what flwr-datasets imports would add seconds to the start, which is measured.
    """
    data, draw = load_examples(workload.dataset, data_dir, device), generator(seed, "partition")
    labels = data.train_y.cpu().numpy()
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(workload.clients)]
    for label in range(data.num_classes):
        members = draw.permutation(np.flatnonzero(labels == label))
        shares = draw.dirichlet([_CONCENTRATION] * workload.clients)
        cuts = (np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    rows = [draw.permutation(np.concatenate(part))[: workload.examples] for part in parts]
    # A client without any example could not train: it gets one.
    return [part if len(part) else np.array([client]) for client, part in enumerate(rows)]
