"""Labels of positions on tensor axes: which must move together, which are pinned, which lie within wholes."""

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
    within
        [2, edges] classes and the wholes that they lie in, each pair once. A class may lie in several wholes that
        cross each other: dimension d of head h lies in the head, and in what is shared by this dimension of all heads.
    tag
        A number by class that tells apart neurons that are summed or normalised in different places.
    """

    of_label: Vector
    pinned: dict[int, str]
    within: Vector
    tag: NDArray[np.uint64]


@dataclass
class Labels:
    """Collects facts about labels while a graph is walked; label 0 stands for what is no neuron."""

    count: int = 1
    sites: dict[tuple[str, int], Vector] = field(default_factory=dict)
    grouped: dict[tuple[str, int], tuple[int, Vector]] = field(default_factory=dict)
    consumed: list[Vector] = field(default_factory=list)
    produced: list[Vector] = field(default_factory=list)
    _ties: list[tuple[Vector, Vector]] = field(default_factory=list)
    _pins: list[tuple[Vector, str]] = field(default_factory=list)
    _tags: list[Vector] = field(default_factory=list)
    _within: list[tuple[Vector, Vector]] = field(default_factory=list)  # members and their wholes, of equal lengths

    def fresh(self, number: int) -> Vector:
        """`number` labels that nobody has."""
        self.count += number
        return np.arange(self.count - number, self.count)

    def site(self, parameter: str, axis: int, size: int) -> Vector:
        """The labels along one axis of a parameter."""
        if (parameter, axis) not in self.sites:
            self.sites[parameter, axis] = self.fresh(size)
        return self.sites[parameter, axis]

    def grouped_site(self, parameter: str, axis: int, size: int, groups: int) -> Vector:
        """The labels [groups * size] of axis 1 of a grouped convolution's weight, which each group has for itself."""
        if (parameter, axis) not in self.grouped:
            self.grouped[parameter, axis] = (groups, self.fresh(size * groups))
        return self.grouped[parameter, axis][1]

    def tie(self, a: Vector, b: Vector) -> None:
        """Positions of `a` move with those of `b`, broadcast against each other; nothing is tied to label 0."""
        a, b = (x.ravel() for x in np.broadcast_arrays(a, b))
        self._pins.append((np.concatenate([a[b == 0], b[a == 0]]), "it meets something that is no neuron"))
        both = (a != 0) & (b != 0)
        self._ties.append((a[both], b[both]))

    def consume(self, labels: Vector) -> None:
        """These take neurons in: they are summed over."""
        self.consumed.append(labels)

    def produce(self, labels: Vector) -> None:
        """Neurons come out of these, though elsewhere the same tensor may take them in."""
        self.produced.append(labels)

    def pin(self, labels: Vector, reason: str) -> None:
        """These may not move."""
        self._pins.append((labels.ravel(), reason))

    def tag(self, labels: Vector) -> None:
        """These are treated alike here, and others are not: a sum or a normalisation over them."""
        self._tags.append(np.unique(labels))

    def blocks(self, members: Vector) -> Vector:
        """Rows of `members` [blocks, size] move as wholes; the labels of the wholes, equal rows having equal ones."""
        rows, inverse = np.unique(members, axis=0, return_inverse=True)
        wholes = self.fresh(len(rows))
        self.lie_within(rows, wholes[:, None])
        return wholes[inverse.ravel()]

    def lie_within(self, members: Vector, wholes: Vector) -> None:
        """Where a whole goes, its members go: those of `members` with equal `wholes` beside them, broadcast."""
        a, b = (x.ravel() for x in np.broadcast_arrays(members, wholes))
        self._pins.append((np.concatenate([a[b == 0], b[a == 0]]), "it meets something that is no neuron"))
        both = (a != 0) & (b != 0)
        self._within.append((a[both], b[both]))

    def copies(self, wholes: Vector, shape: tuple[int, ...]) -> Vector:
        """Labels of exact copies: a grid broadcast to a shape, every entry a neuron that lies in what it copies."""
        full = np.broadcast_to(wholes, shape)
        labels = np.where(full == 0, 0, self.fresh(full.size).reshape(shape))
        self.lie_within(labels[full != 0], full[full != 0])
        return labels

    def ordered(self, grid: Vector, axes: tuple[int, ...], reason: str) -> None:
        """Entries of a grid at different places along these axes are not to be exchanged; all else may be."""
        if all(grid.shape[a] == 1 for a in range(grid.ndim) if a not in axes):
            self.pin(grid, reason)
            return
        shape = [size if a in axes else 1 for a, size in enumerate(grid.shape)]
        places = self.fresh(int(np.prod(shape))).reshape(shape)
        self.pin(places, reason)
        self.lie_within(grid, places)

    def classes(self) -> Classes:
        """Join what is tied, and wholes of the same members; what is pinned pins the wholes that it lies in."""
        joins: list[tuple[Vector, Vector]] = []
        while True:
            of_label = self._joined(joins)
            within = self._edges(of_label)
            more = _same_wholes(within)
            if more is None:
                break
            first = np.zeros(int(of_label.max()) + 1, dtype=np.int64)
            first[of_label[::-1]] = np.arange(self.count)[::-1]
            joins.append((first[more[0]], first[more[1]]))
        total = int(of_label.max()) + 1
        known = [x for pair in [*self._ties, *self._within] for x in pair] + self._tags
        seen = np.zeros(self.count, dtype=bool)
        for labels in known:
            seen[labels.ravel()] = True
        self._pins.append((np.flatnonzero(~seen), "no operator treats it as neurons"))
        pinned = {int(of_label[0]): "no neuron"}
        for labels, reason in self._pins:
            for c in np.unique(of_label[labels]):
                pinned.setdefault(int(c), reason)
        _pin_wholes(within, pinned)
        tag = np.zeros(total, dtype=np.uint64)
        salt = np.random.default_rng(0)  # random numbers make the sum of a class's tags all but surely unique
        for labels in self._tags:
            np.add.at(tag, np.unique(of_label[labels]), salt.integers(1, 2**62, dtype=np.uint64))
        return Classes(of_label, pinned, within, tag)

    def _edges(self, of_label: Vector) -> Vector:
        """[2, edges] members and wholes."""
        if not self._within:
            return np.zeros((2, 0), dtype=np.int64)
        pairs = np.stack([of_label[np.concatenate(side)] for side in zip(*self._within, strict=True)])
        return np.unique(pairs[:, pairs[0] != pairs[1]], axis=1)

    def _joined(self, more: list[tuple[Vector, Vector]]) -> Vector:
        # Here, for it takes as long as the rest of fedmerge, which also starts where nothing is traced.
        from scipy import sparse  # noqa: PLC0415
        from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

        pairs = [*self._ties, *more]
        rows = np.concatenate([a for a, _ in pairs]) if pairs else np.zeros(0, dtype=int)
        columns = np.concatenate([b for _, b in pairs]) if pairs else np.zeros(0, dtype=int)
        graph = sparse.coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(self.count, self.count))
        components: Any = connected_components(graph, directed=False)[1]
        return np.asarray(components, dtype=np.int64)


def _same_wholes(within: Vector) -> tuple[Vector, Vector] | None:
    """Pairs of classes that are one: wholes of the same members, and a whole with its only member."""
    members, wholes = within
    if not members.size:
        return None
    size = int(within.max()) + 1
    counts = np.bincount(wholes, minlength=size)
    alone = counts[wholes] == 1
    sums = np.zeros(size, dtype=np.uint64)
    np.add.at(sums, wholes, np.random.default_rng(3).integers(1, 2**62, size=size, dtype=np.uint64)[members])
    known = np.flatnonzero(counts)
    _, first, inverse = np.unique(sums[known], return_index=True, return_inverse=True)
    same = known[first[inverse]]
    differ = same != known
    if not alone.any() and not differ.any():
        return None
    return np.concatenate([members[alone], same[differ]]), np.concatenate([wholes[alone], known[differ]])


def _pin_wholes(within: Vector, pinned: dict[int, str]) -> None:
    """Wholes of pinned members are pinned, and those that lie within themselves."""
    above: dict[int, list[int]] = {}
    for member, whole in within.T.tolist():
        above.setdefault(member, []).append(whole)
    waiting = [c for c in pinned if c in above]
    while waiting:
        member = waiting.pop()
        reason = pinned[member].removeprefix("a member of the block is pinned: ")
        for whole in above.get(member, ()):
            if whole not in pinned:
                pinned[whole] = f"a member of the block is pinned: {reason}"
                waiting.append(whole)
