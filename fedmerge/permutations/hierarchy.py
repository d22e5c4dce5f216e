"""What lies within what: neurons in blocks, and in several blocks that cross each other."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedmerge.permutations.labels import Classes, Vector

__all__ = ["Hierarchy"]

_Key = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


class Hierarchy:
    """Classes, the wholes that they lie in, and wholes that hold together what crosses.

    Where the heads of a group share a key, dimensions of the key cross the heads: the query's dimension d of head j
    lies in both. Neither is part of the other, but only the group with all its heads and dimensions can be exchanged
    with another group. So all that hangs together gets one whole more, unless it has a topmost one.

    Parameters
    ----------
    classes
        As the labels came to.
    own
        A number by class that tells apart classes that stand in different places.
    first
        The first label of each class: the order among equals.
    """

    def __init__(self, classes: Classes, own: NDArray[np.uint64], first: Vector) -> None:
        self.pinned = classes.pinned
        self.above: dict[int, set[int]] = defaultdict(set)
        self.below: dict[int, set[int]] = defaultdict(set)
        for member, whole in classes.within.T.tolist():
            self.above[member].add(whole)
            self.below[whole].add(member)
        self._nest()
        self._first: list[int] = first.tolist()
        self.count = len(own) + self._hold_together(len(own))
        self.color = np.zeros(self.count, dtype=np.uint64)
        self.color[: len(own)] = own
        self._color()
        self._layouts: dict[int, tuple[list[int], _Key]] = {}

    def _nest(self) -> None:
        """Of two wholes of one member, that with fewer members lies in the other, where that has them all."""
        pairs = {(a, b) for wholes in self.above.values() for a in wholes for b in wholes if a != b}
        for small, large in [(a, b) for a, b in pairs if self.below[a] < self.below[b]]:
            self.above[small].add(large)
            self.below[large].add(small)
        for member in list(self.above):
            wholes = self.above[member]
            if len(wholes) > 1:
                further = set().union(*(self._ancestors(w) for w in wholes))
                for whole in wholes & further:
                    self.below[whole].discard(member)
                wholes -= further

    def _ancestors(self, start: int) -> set[int]:
        ancestors: set[int] = set()
        waiting = list(self.above.get(start, ()))
        while waiting:
            c = waiting.pop()
            if c not in ancestors:
                ancestors.add(c)
                waiting += self.above.get(c, ())
        return ancestors

    def _hold_together(self, total: int) -> int:
        """Give what hangs together and has several topmost wholes one more; how many there are of these."""
        seen: set[int] = set(self.pinned)
        made = 0
        for start in sorted(self.above):
            if start in seen:
                continue
            part, waiting = [], [start]
            seen.add(start)
            while waiting:
                c = waiting.pop()
                part.append(c)
                beside = [x for x in (*self.above.get(c, ()), *self.below.get(c, ())) if x not in seen]
                seen.update(beside)
                waiting += beside
            tops = [c for c in part if not self.above.get(c, set()) - self.pinned.keys()]
            if len(tops) > 1:
                self.below[total + made] = set(tops)
                self._first.append(min(self._first[c] for c in part))
                for c in tops:
                    self.above[c] = self.above[c] | {total + made}
                made += 1
        return made

    @cached_property
    def order(self) -> list[int]:
        """All that lies within something or holds something, wholes before their members."""
        waits = {c: len(self.above.get(c, ())) for c in (*self.above, *self.below)}
        ready = sorted(c for c, number in waits.items() if number == 0)
        order = []
        while ready:
            c = ready.pop()
            order.append(c)
            for member in sorted(self.below.get(c, ())):
                waits[member] -= 1
                if waits[member] == 0:
                    ready.append(member)
        for c in waits.keys() - set(order):
            self.pinned.setdefault(c, "it lies within itself")
        return order

    def _color(self) -> None:
        """Wholes are told apart by their members."""
        mask = 2**64 - 1
        for c in reversed(self.order):
            color = int(self.color[c])
            for member in self.below.get(c, ()):
                mixed = int(self.color[member]) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03 & mask
                color += (mixed ^ mixed >> 29) * (mixed | 1)
            self.color[c] = color & mask

    @cached_property
    def _depth(self) -> dict[int, int]:
        depth: dict[int, int] = {}
        for c in self.order:
            depth[c] = 1 + max((depth[w] for w in self.above.get(c, ())), default=0)
        return depth

    def layout(self, whole: int) -> tuple[list[int], _Key]:
        """All that lies within a whole, in an order that is the same for alike ones; and what makes them alike.

        Members are told apart by their colours and by the wholes that they lie in: by rank where those are within
        this whole too, by name where they are not.
        """
        if whole not in self._layouts:
            inside: set[int] = set()
            waiting = list(self.below.get(whole, ()))
            while waiting:
                c = waiting.pop()
                if c not in inside:
                    inside.add(c)
                    waiting += self.below.get(c, ())
            rank = {whole: 0}
            layout: list[int] = []
            keys: list[tuple[int, tuple[tuple[int, int], ...]]] = []
            by_depth: dict[int, list[int]] = defaultdict(list)
            for c in inside:
                by_depth[self._depth.get(c, 0)].append(c)
            for depth in sorted(by_depth):
                level = []
                for c in by_depth[depth]:
                    lies = tuple(sorted((0, rank[w]) if w in rank else (1, w) for w in self.above[c]))
                    level.append(((int(self.color[c]), lies), self._first[c], c))
                for key, _, c in sorted(level):
                    rank[c] = len(layout) + 1
                    layout.append(c)
                    keys.append(key)
            self._layouts[whole] = layout, tuple(keys)
        return self._layouts[whole]

    def first(self, c: int) -> int:
        """The first label of a class or of what lies within it."""
        return min(self._first[x] for x in (c, *self.layout(c)[0]))
