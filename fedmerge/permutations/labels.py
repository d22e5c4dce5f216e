"""Labels of positions on tensor axes: which must move together, which are pinned, which form blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Classes", "Labels", "Vector"]

Vector = NDArray[np.int64]


@dataclass(frozen=True)
class Classes:
    """What the ties of a model come to: positions with equal labels are one neuron.

    Parameters
    ----------
    of_label
        Class of every label.
    pinned
        Why a class may not move, by class.
    parent
        The block that a class lies in, or -1, by class.
    tag
        A number by class that tells apart neurons that are summed or normalised in different places.
    """

    of_label: Vector
    pinned: dict[int, str]
    parent: Vector
    tag: NDArray[np.uint64]


@dataclass
class Labels:
    """Collects facts about labels while a graph is walked; label 0 stands for what is no neuron."""

    count: int = 1
    sites: dict[tuple[str, int], Vector] = field(default_factory=dict)
    consumed: list[Vector] = field(default_factory=list)
    _ties: list[tuple[Vector, Vector]] = field(default_factory=list)
    _pins: list[tuple[Vector, str]] = field(default_factory=list)
    _tags: list[Vector] = field(default_factory=list)
    _blocks: list[tuple[Vector, Vector]] = field(default_factory=list)  # members [blocks, size], parents [blocks]

    def fresh(self, number: int) -> Vector:
        """`number` labels that nobody has."""
        self.count += number
        return np.arange(self.count - number, self.count)

    def site(self, parameter: str, axis: int, size: int) -> Vector:
        """The labels along one axis of a parameter."""
        if (parameter, axis) not in self.sites:
            self.sites[parameter, axis] = self.fresh(size)
        return self.sites[parameter, axis]

    def tie(self, a: Vector, b: Vector) -> None:
        """Positions of `a` move with those of `b`, broadcast against each other; nothing is tied to label 0."""
        a, b = (x.ravel() for x in np.broadcast_arrays(a, b))
        self._pins.append((np.concatenate([a[b == 0], b[a == 0]]), "it meets something that is no neuron"))
        both = (a != 0) & (b != 0)
        self._ties.append((a[both], b[both]))

    def consume(self, labels: Vector) -> None:
        """These take neurons in: they are summed over."""
        self.consumed.append(labels)

    def pin(self, labels: Vector, reason: str) -> None:
        """These may not move."""
        self._pins.append((labels.ravel(), reason))

    def tag(self, labels: Vector) -> None:
        """These are treated alike here, and others are not: a sum or a normalisation over them."""
        self._tags.append(np.unique(labels))

    def blocks(self, members: Vector) -> Vector:
        """Rows of `members` [blocks, size] move as wholes; the labels of the wholes, equal rows having equal ones."""
        rows, inverse = np.unique(members, axis=0, return_inverse=True)
        parents = self.fresh(len(rows))
        self._blocks.append((rows, parents))
        return parents[inverse.ravel()]

    def classes(self) -> Classes:
        """Join what is tied; wherever the facts do not fit a two-level symmetry, pin."""
        of_label = self._joined([])
        merges, conflicts = self._parents(of_label)
        if merges:
            of_label = self._joined(merges)
            _, conflicts = self._parents(of_label)
        pinned = {int(of_label[0]): "no neuron"}
        known = [x for pair in [*self._ties, *self._blocks] for x in pair] + self._tags
        seen = np.zeros(self.count, dtype=bool)
        for labels in known:
            seen[labels.ravel()] = True
        self._pins.append((np.flatnonzero(~seen), "no operator treats it as neurons"))
        for labels, reason in [*self._pins, *conflicts]:
            for c in np.unique(of_label[labels]):
                pinned.setdefault(int(c), reason)
        total = int(of_label.max()) + 1
        parent = np.full(total, -1)
        for rows, parents in self._blocks:
            parent[of_label[rows]] = of_label[parents][:, None]
        for c in np.flatnonzero(parent >= 0):
            if int(c) in pinned:
                pinned.setdefault(int(parent[c]), f"a member of the block is pinned: {pinned[int(c)]}")
        tag = np.zeros(total, dtype=np.uint64)
        salt = np.random.default_rng(0)  # random numbers make the sum of a class's tags all but surely unique
        for labels in self._tags:
            np.add.at(tag, np.unique(of_label[labels]), salt.integers(1, 2**62, dtype=np.uint64))
        return Classes(of_label, pinned, parent, tag)

    def _joined(self, more: list[tuple[Vector, Vector]]) -> Vector:
        # Here, for it takes as long as the rest of fedmerge, which also starts where nothing is traced.
        from scipy import sparse  # noqa: PLC0415
        from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

        pairs = [*self._ties, *more]
        rows = np.concatenate([a for a, _ in pairs]) if pairs else np.zeros(0, dtype=int)
        columns = np.concatenate([b for _, b in pairs]) if pairs else np.zeros(0, dtype=int)
        graph = sparse.coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(self.count, self.count))
        found: Any = connected_components(graph, directed=False)[1]
        return np.asarray(found, dtype=np.int64)

    def _parents(self, of_label: Vector) -> tuple[list[tuple[Vector, Vector]], list[tuple[Vector, str]]]:
        """Blocks that share members are one block; those that then overlap without being equal are none."""
        merges, conflicts = [], []
        first: dict[int, int] = {}
        kinds: dict[int, dict[int, frozenset[int]]] = {}  # by block and member: the members that come with it
        for rows, parents in self._blocks:
            for row, parent in zip(rows, parents, strict=True):
                whole = frozenset(of_label[row].tolist())
                block = kinds.setdefault(int(of_label[parent]), {})
                if any(block.setdefault(member, whole) != whole for member in whole):
                    conflicts.append((np.concatenate([row, [parent]]), "blocks of different kinds overlap here"))
                known = first.setdefault(min(whole), int(parent))
                if of_label[known] != of_label[parent]:
                    merges.append((np.array([known]), np.array([parent])))
        return merges, conflicts
