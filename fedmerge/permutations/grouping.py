"""From classes of tied positions to groups of neurons that may be exchanged."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.permutations.hierarchy import Hierarchy
from fedmerge.permutations.labels import Classes, Labels, Vector
from fedmerge.permutations.spec import Group, Site

__all__ = ["groups_of", "pinned_axes"]

_Place = tuple[str, int, int]  # parameter, axis, groups of the convolution that it belongs to


def groups_of(labels: Labels, classes: Classes) -> tuple[Group, ...]:
    """Neurons with the same places, in the same numbers, form a group; blocks of such neurons form one as well."""
    vectors: dict[_Place, Vector] = {(name, axis, 1): found for (name, axis), found in labels.sites.items()}
    vectors |= {(name, axis, groups): found for (name, axis), (groups, found) in labels.grouped.items()}
    sites = list(vectors)
    at = [classes.of_label[found] for found in vectors.values()]
    total = int(classes.of_label.max()) + 1
    salt = np.random.default_rng(1).integers(1, 2**62, size=(len(sites) + 1), dtype=np.uint64)
    own = classes.tag.copy()
    for number, found in zip(salt, at, strict=False):
        np.add.at(own, found, number)
    first = np.full(total, labels.count)
    np.minimum.at(first, classes.of_label, np.arange(labels.count))
    hierarchy = Hierarchy(classes, own, first)
    signature = hierarchy.color.copy()
    spread = np.random.default_rng(2).integers(1, 2**62, size=hierarchy.count, dtype=np.uint64)
    for c, wholes in hierarchy.above.items():  # only what lies in the same wholes is exchanged
        signature[c : c + 1] += spread[list(wholes)].sum(dtype=np.uint64)  # a slice, as numbers warn where they wrap

    places = _places(at)
    taken = np.zeros(labels.count, dtype=bool)
    for vector in labels.consumed:
        taken[vector] = True
    for vector in labels.produced:  # a table that is the output's weight too is what makes its neurons
        taken[vector] = False
    consumed = {site for site, vector in vectors.items() if taken[vector].all()}
    placed = np.zeros(hierarchy.count, dtype=bool)
    for found in at:
        placed[found] = True
    for c in reversed(hierarchy.order):  # a whole stands where its members stand
        placed[c] |= any(placed[member] for member in hierarchy.below.get(c, ()))
    free = placed
    free[list(hierarchy.pinned)] = False
    alike = _alike(np.flatnonzero(free), signature, first, hierarchy)
    alike = [kept for members in alike for kept in _same_layout(members, hierarchy)]
    return _in_order(_nested(alike, hierarchy), sites, consumed, places, hierarchy)


def _same_layout(members: list[int], hierarchy: Hierarchy) -> list[list[int]]:
    """Those whose members correspond to each other, two at least."""
    if not hierarchy.below.get(members[0]):
        return [members]
    found = defaultdict(list)
    for c in members:
        found[hierarchy.layout(c)[1]].append(c)
    return [kept for kept in found.values() if len(kept) > 1]


def _nested(alike: list[list[int]], hierarchy: Hierarchy) -> list[list[int]]:
    """Without blocks of blocks: two levels are all that can be matched."""
    block = {c for members in alike for c in members if hierarchy.below.get(c)}
    exchanged = {c for members in alike for c in members}
    deep = {c for c in block if any(x in exchanged for x in hierarchy.layout(c)[0])}
    return [members for members in alike if not any(x in deep for x in hierarchy.layout(members[0])[0])]


def _in_order(
    alike: list[list[int]],
    sites: list[_Place],
    consumed: set[_Place],
    places: list[dict[int, Vector]],
    hierarchy: Hierarchy,
) -> tuple[Group, ...]:
    """From input to output; blocks right after what is within them."""
    index = {c: i for i, members in enumerate(alike) for c in members}
    firsts = [min(hierarchy.first(c) for c in members) for members in alike]
    within = [
        [tuple(dict.fromkeys(index[x] for x in hierarchy.layout(c)[0] if x in index)) for c in members]
        if hierarchy.below.get(members[0]) else []
        for members in alike
    ]  # fmt: skip
    keys = []
    for i, inner in enumerate(within):
        inside = [firsts[g] for block in inner for g in block]
        keys.append((max(inside) + 0.5 if inside else float(firsts[i]), i))
    order = [i for _, i in sorted(keys)]
    place = {old: new for new, old in enumerate(order)}
    found = []
    for i in order:
        neurons = [[c, *hierarchy.layout(c)[0]] if hierarchy.below.get(c) else [c] for c in alike[i]]
        group = _group(sites, consumed, places, neurons)
        parts = tuple(tuple(place[g] for g in block) for block in within[i])
        found.append(replace(group, inner=parts if any(parts) else ()))
    return tuple(found)


def _places(at: list[Vector]) -> list[dict[int, Vector]]:
    """For every site, the positions of each class."""
    found = []
    for classes in at:
        order = np.argsort(classes, kind="stable")
        values, starts = np.unique(classes[order], return_index=True)
        found.append(dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True)))
    return found


def _alike(candidates: Vector, signature: NDArray[np.uint64], first: Vector, hierarchy: Hierarchy) -> list[list[int]]:
    """Classes of equal signature, two at least, ordered by where they first appear."""
    begins = np.concatenate([first, np.zeros(hierarchy.count - len(first), dtype=np.int64)])
    for c in candidates:
        if hierarchy.below.get(int(c)):
            begins[c] = hierarchy.first(int(c))
    found: dict[int, list[int]] = defaultdict(list)
    for c in candidates[np.argsort(begins[candidates], kind="stable")]:
        found[int(signature[c])].append(int(c))
    return [members for members in found.values() if len(members) > 1]


def _group(
    sites: list[_Place],
    consumed: set[_Place],
    places: list[dict[int, Vector]],
    neurons: list[list[int]],
) -> Group:
    kept = []
    for place, known in zip(sites, places, strict=True):
        if any(c in known for c in neurons[0]):
            rows = [np.concatenate([known[c] for c in neuron if c in known]) for neuron in neurons]
            role: Literal["in", "out"] = "in" if place in consumed else "out"
            name, axis, groups = place
            kept.append(Site(name, axis, torch.from_numpy(np.stack(rows)), role, groups))
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
