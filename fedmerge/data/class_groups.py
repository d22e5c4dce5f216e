"""Clients that hold disjoint groups of classes: different tasks of one label space."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmerge.errors import shown

__all__ = ["ClassGroups"]


class ClassGroups:
    """Divides a table of ``row`` and ``key`` (the class) by groups of classes, as the partitioners of flwr-datasets do.

    Parameters
    ----------
    clients : int
        Number of clients; client k has group k modulo the number of groups.
    groups : int, tuple of tuples of int, or None
        How many groups, or the classes of each; None makes one for each client, at most one for each class.

    Raises
    ------
    ValueError
        From :meth:`load_partition`: there are more groups than classes or than clients, or a class of no example.
    """

    dataset: Any = None

    def __init__(self, clients: int, groups: int | tuple[tuple[int, ...], ...] | None) -> None:
        self.num_partitions, self._groups = clients, groups

    def load_partition(self, position: int) -> Any:
        """The rows of one client; those of a group are dealt to its clients in the table's order, which is random."""
        keys = self.dataset[:]["key"].to_numpy()
        groups = self._classes(keys)
        number = position % len(groups)
        of_group = np.flatnonzero(np.isin(keys, groups[number]))
        sharing = len(range(number, self.num_partitions, len(groups)))
        return self.dataset.select(of_group[position // len(groups) :: sharing])

    def _classes(self, keys: np.ndarray[Any, Any]) -> list[list[int]]:
        """The classes of each group."""
        there = np.unique(keys)
        if isinstance(self._groups, tuple):
            absent = [label for group in self._groups for label in group if label not in there]
            if absent:
                raise ValueError(f"groups name class {absent[0]}, of which there is no example")
            groups = [list(group) for group in self._groups]
        else:
            number = min(self.num_partitions, len(there)) if self._groups is None else self._groups
            if number > len(there):
                raise ValueError(f"groups={number} are more than the {len(there)} classes")
            groups = [part.tolist() for part in np.array_split(there, number)]
        if len(groups) > self.num_partitions:
            raise ValueError(f"{len(groups)} groups, {shown(groups, 60)}, want a client each")
        return groups
