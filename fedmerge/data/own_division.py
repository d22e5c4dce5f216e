"""A division of one's own: a function, named ``module:function``, that says who holds which training examples.

Another package may announce one by an entry point of the group ``fedmerge.partitions``. It is called as
``divide(dataset, clients, generator, **options)``: the :class:`~fedmerge.data.Dataset`, the number of clients asked for
(None where that is up to it), a :class:`numpy.random.Generator` of the partition's own, and ``partition.options``. It
returns one of

- a list with the row numbers of each client,
- a mapping from names of clients to their row numbers,
- an array of the client of every example, -1 for nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.data.dataset import Dataset
from fedmerge.data.partition_settings import PartitionSettings
from fedmerge.errors import FedMergeError, PartitionError, shown
from fedmerge.lookup.loading import load_named
from fedmerge.registry import entry

__all__ = ["own_division", "rows_by_client"]

Rows = NDArray[np.int64]


def own_division(
    dataset: Dataset, settings: PartitionSettings, generator: np.random.Generator
) -> tuple[tuple[str, ...], list[Rows]]:
    """Names of the clients and their rows, as the function that the settings name has it.

    Raises
    ------
    PartitionError
        The function cannot be had, fails, or divides into what is no division.
    """
    where = f"partition of data set {dataset.name!r} by {settings.scheme}"
    if ":" in settings.scheme:
        function = load_named(settings.scheme, "partition", "function", "my_data:by_ward", PartitionError)
    else:
        function = entry("partition", settings.scheme).cls
    try:
        division = function(dataset, settings.clients, generator, **settings.options)
    except FedMergeError:
        raise
    except Exception as error:  # a person's own function may raise anything
        raise PartitionError(
            f"{where}: the function fails ({type(error).__name__}: {error}); it is called as divide(dataset, clients, "
            "generator, **options)"
        ) from error
    names, parts = rows_by_client(division, len(dataset.train), where)
    if settings.clients is not None and len(parts) != settings.clients:
        raise PartitionError(
            f"{where}: it made {len(parts)} clients, {settings.clients} were asked for: leave partition.clients out, "
            "or have it make so many"
        )
    return names, parts


def rows_by_client(division: Any, examples: int, where: str) -> tuple[tuple[str, ...], list[Rows]]:
    """Names and rows of what a function returned.

    Raises
    ------
    PartitionError
        It is no division: rows that there are not, or that two clients have.

    Examples
    --------
    >>> rows_by_client([1, 0, -1, 1], 4, "toy")
    (('client-0', 'client-1'), [array([1]), array([0, 3])])
    """
    if isinstance(division, Mapping):
        names = tuple(map(str, division))
        parts = [_whole(rows, where) for rows in division.values()]
    else:
        if isinstance(division, Sequence) and (not division or any(np.ndim(part) for part in division)):
            parts = [_whole(rows, where) for rows in division]
        else:
            owner = _whole(division, where)
            if len(owner) != examples:
                raise PartitionError(
                    f"{where}: it gave a client for {len(owner)} of {examples} examples: give each one, -1 for nobody"
                )
            parts = [np.flatnonzero(owner == client) for client in range(int(owner.max(initial=-1)) + 1)]
        names = tuple(f"client-{client}" for client in range(len(parts)))
    if not parts:
        raise PartitionError(f"{where}: it made no clients: return a list with the row numbers of each")
    together = np.concatenate(parts)
    if len(together) and not 0 <= together.min() <= together.max() < examples:
        wrong = int(together[(together < 0) | (together >= examples)][0])
        raise PartitionError(f"{where}: it gave row {wrong}, the training examples are 0 to {examples - 1}")
    rows, counts = np.unique(together, return_counts=True)
    if len(counts) and counts.max() > 1:
        twice = int(rows[counts > 1][0])
        raise PartitionError(f"{where}: it gave row {twice} {counts.max()} times: give each to one client")
    return names, parts


def _whole(rows: Any, where: str) -> Rows:
    array = rows.cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise PartitionError(f"{where}: it gave {shown(rows, 60)} as rows: give whole numbers, one after the other")
    return array.astype(np.int64)
