"""From classes of tied positions to groups of neurons that may be exchanged."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.permutations.labels import Classes, Labels, Vector
from fedmerge.permutations.spec import Group, Site

__all__ = ["groups_of", "pinned_axes"]


def groups_of(labels: Labels, classes: Classes) -> tuple[Group, ...]:
    """Neurons with the same places, in the same numbers, form a group; blocks of such neurons form one as well."""
    sites = list(labels.sites)
    at = [classes.of_label[labels.sites[s]] for s in sites]
    total = len(classes.parent)
    salt = np.random.default_rng(1).integers(1, 2**62, size=(len(sites) + 1), dtype=np.uint64)
    signature = classes.tag.copy()
    for number, found in zip(salt, at, strict=False):
        np.add.at(signature, found, number)
    inside = classes.parent >= 0
    own = signature.copy()
    np.add.at(signature, classes.parent[inside], own[inside] * own[inside])  # blocks are told apart by their members
    spread = np.random.default_rng(2).integers(1, 2**62, size=total, dtype=np.uint64)
    signature[inside] += spread[classes.parent[inside]]
    first = np.full(total, labels.count)
    np.minimum.at(first, classes.of_label, np.arange(labels.count))

    places = _places(at)
    taken = np.zeros(labels.count, dtype=bool)
    for vector in labels.consumed:
        taken[vector] = True
    consumed = {site for site, vector in labels.sites.items() if taken[vector].all()}
    placed = np.zeros(total, dtype=bool)
    for found in at:
        placed[found] = True
    children: dict[int, list[int]] = defaultdict(list)
    for c in np.flatnonzero(inside):
        children[int(classes.parent[c])].append(int(c))
    for members in children.values():
        members.sort(key=lambda c: (int(own[c]), int(first[c])))

    free = np.array([c not in classes.pinned for c in range(total)], dtype=bool)
    blocks = np.zeros(total, dtype=bool)
    blocks[list(children)] = True
    simple = _alike(np.flatnonzero(free & placed & ~blocks), signature, first)
    groups = [_group(sites, consumed, places, [[c] for c in members]) for members in simple]
    index = {c: i for i, members in enumerate(simple) for c in members}
    for members in _alike(np.flatnonzero(free & blocks), signature, first):
        wholes = [children[c] for c in members]
        inner = tuple(tuple(dict.fromkeys(index[c] for c in whole if c in index)) for whole in wholes)
        whole_group = _group(sites, consumed, places, [[c, *whole] for c, whole in zip(members, wholes, strict=True)])
        groups.append(Group(whole_group.name, whole_group.size, whole_group.sites, inner))
    return _in_order(groups, [int(first[members[0]]) for members in simple])


def _in_order(groups: list[Group], first: list[int]) -> tuple[Group, ...]:
    """From input to output; blocks right after what is within them."""
    keys = [(float(f), i) for i, f in enumerate(first)]
    for i, group in enumerate(groups[len(first) :], len(first)):
        within = [first[g] for block in group.inner for g in block]
        keys.append((max(within) + 0.5 if within else float("inf"), i))
    order = [i for _, i in sorted(keys)]
    place = {old: new for new, old in enumerate(order)}
    moved = []
    for i in order:
        inner = tuple(tuple(place[g] for g in block) for block in groups[i].inner)
        moved.append(replace(groups[i], inner=inner))
    return tuple(moved)


def _places(at: list[Vector]) -> list[dict[int, Vector]]:
    """For every site, the positions of each class."""
    found = []
    for classes in at:
        order = np.argsort(classes, kind="stable")
        values, starts = np.unique(classes[order], return_index=True)
        found.append(dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True)))
    return found


def _alike(candidates: Vector, signature: NDArray[np.uint64], first: Vector) -> list[list[int]]:
    """Classes of equal signature, two at least, ordered by where they first appear."""
    found: dict[int, list[int]] = defaultdict(list)
    for c in candidates[np.argsort(first[candidates])]:
        found[int(signature[c])].append(int(c))
    return [members for members in found.values() if len(members) > 1]


def _group(
    sites: list[tuple[str, int]],
    consumed: set[tuple[str, int]],
    places: list[dict[int, Vector]],
    neurons: list[list[int]],
) -> Group:
    kept = []
    for (name, axis), known in zip(sites, places, strict=True):
        if any(c in known for c in neurons[0]):
            rows = [np.concatenate([known[c] for c in neuron if c in known]) for neuron in neurons]
            role: Literal["in", "out"] = "in" if (name, axis) in consumed else "out"
            kept.append(Site(name, axis, torch.from_numpy(np.stack(rows)), role))
    main = next((site for site in kept if site.role == "out"), kept[0])
    return Group(main.parameter, len(neurons), tuple(kept))


def pinned_axes(labels: Labels, classes: Classes) -> dict[tuple[str, int], str]:
    """Why an axis, or the first pinned part of it, is pinned."""
    reasons = {}
    for site, vector in labels.sites.items():
        found = [int(c) for c in dict.fromkeys(classes.of_label[vector].tolist()) if int(c) in classes.pinned]
        if found:
            reasons[site] = classes.pinned[found[0]]
    return reasons
