"""From classes of tied positions to groups of neurons that may be exchanged.

A class is a set of positions (on axes of parameters) that must move together: one neuron. Two neurons may be exchanged
if they have positions on the same axes, equally many on each, and lie in the same larger wholes. Such neurons form a
group. Wholes, such as attention heads, are exchanged as blocks by the same rule.
"""

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
    """Groups of exchangeable neurons, then of exchangeable blocks of neurons, in order from input to output.

    Neurons are compared by a signature: the sum of one random number for each position. Equal sums mean the same axes
    with equal counts, but for a chance of about 2**-62. This takes one pass, where comparing pairs would not scale.
    """
    vectors: dict[_Place, Vector] = {(name, axis, 1): vector for (name, axis), vector in labels.sites.items()}
    vectors |= {(name, axis, groups): vector for (name, axis), (groups, vector) in labels.grouped.items()}
    sites = list(vectors)
    classes_at = [classes.of_label[vector] for vector in vectors.values()]
    total = int(classes.of_label.max()) + 1
    salt = np.random.default_rng(1).integers(1, 2**62, size=(len(sites) + 1), dtype=np.uint64)
    own = classes.tag.copy()
    for number, class_vector in zip(salt, classes_at, strict=False):
        np.add.at(own, class_vector, number)
    first = np.full(total, labels.count)
    np.minimum.at(first, classes.of_label, np.arange(labels.count))
    hierarchy = Hierarchy(classes, own, first)
    signature = hierarchy.color.copy()
    spread = np.random.default_rng(2).integers(1, 2**62, size=hierarchy.count, dtype=np.uint64)
    for c, wholes in hierarchy.above.items():  # neurons of different wholes are not exchanged one by one
        # Added to a slice: a NumPy scalar would warn when the sum wraps around, which it may.
        signature[c : c + 1] += spread[list(wholes)].sum(dtype=np.uint64)

    positions = _positions_by_class(classes_at)
    is_input = np.zeros(labels.count, dtype=bool)
    for vector in labels.consumed:
        is_input[vector] = True
    # An embedding table that also serves as the output's weight is read by both; it is what produces the neurons.
    for vector in labels.produced:
        is_input[vector] = False
    consumed = {site for site, vector in vectors.items() if is_input[vector].all()}
    movable = np.zeros(hierarchy.count, dtype=bool)
    for class_vector in classes_at:
        movable[class_vector] = True
    for c in reversed(hierarchy.order):  # a whole has the positions of its members
        movable[c] |= any(movable[member] for member in hierarchy.below.get(c, ()))
    movable[list(hierarchy.pinned)] = False
    alike = _equal_signatures(np.flatnonzero(movable), signature, first, hierarchy)
    alike = [same for members in alike for same in _same_layout(members, hierarchy)]
    return _in_order(_at_most_two_levels(alike, hierarchy), sites, consumed, positions, hierarchy)


def _same_layout(members: list[int], hierarchy: Hierarchy) -> list[list[int]]:
    """Split blocks into those whose members correspond one to one; a block that equals no other is left out."""
    if not hierarchy.below.get(members[0]):
        return [members]
    by_layout = defaultdict(list)
    for c in members:
        by_layout[hierarchy.layout(c)[1]].append(c)
    return [same for same in by_layout.values() if len(same) > 1]


def _at_most_two_levels(alike: list[list[int]], hierarchy: Hierarchy) -> list[list[int]]:
    """Leave out blocks of blocks: matching handles neurons, and neurons within blocks, but no third level."""
    block = {c for members in alike for c in members if hierarchy.below.get(c)}
    exchanged = {c for members in alike for c in members}
    deep = {c for c in block if any(x in exchanged for x in hierarchy.layout(c)[0])}
    return [members for members in alike if not any(x in deep for x in hierarchy.layout(members[0])[0])]


def _in_order(
    alike: list[list[int]],
    sites: list[_Place],
    consumed: set[_Place],
    positions: list[dict[int, Vector]],
    hierarchy: Hierarchy,
) -> tuple[Group, ...]:
    """Groups from input to output; a group of blocks comes right after the last group of neurons within them."""
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
    rank = {old: new for new, old in enumerate(order)}
    groups = []
    for i in order:
        # A block moves with all that lies within it.
        neurons = [[c, *hierarchy.layout(c)[0]] if hierarchy.below.get(c) else [c] for c in alike[i]]
        group = _group(sites, consumed, positions, neurons)
        inner_groups = tuple(tuple(rank[g] for g in block) for block in within[i])
        groups.append(replace(group, inner=inner_groups if any(inner_groups) else ()))
    return tuple(groups)


def _positions_by_class(classes_at: list[Vector]) -> list[dict[int, Vector]]:
    """For every site, the positions of each class along its axis."""
    positions = []
    for class_vector in classes_at:
        order = np.argsort(class_vector, kind="stable")
        values, starts = np.unique(class_vector[order], return_index=True)
        positions.append(dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True)))
    return positions


def _equal_signatures(
    candidates: Vector, signature: NDArray[np.uint64], first: Vector, hierarchy: Hierarchy
) -> list[list[int]]:
    """Sets of two or more classes with equal signatures, each ordered by where its classes first appear."""
    begins = np.concatenate([first, np.zeros(hierarchy.count - len(first), dtype=np.int64)])
    for c in candidates:
        if hierarchy.below.get(int(c)):
            begins[c] = hierarchy.first(int(c))
    by_signature: dict[int, list[int]] = defaultdict(list)
    for c in candidates[np.argsort(begins[candidates], kind="stable")]:
        by_signature[int(signature[c])].append(int(c))
    return [members for members in by_signature.values() if len(members) > 1]


def _group(
    sites: list[_Place],
    consumed: set[_Place],
    positions: list[dict[int, Vector]],
    neurons: list[list[int]],
) -> Group:
    """A group with its sites, named after the first parameter that produces its neurons."""
    touched = []
    for place, of_class in zip(sites, positions, strict=True):
        if any(c in of_class for c in neurons[0]):
            rows = [np.concatenate([of_class[c] for c in neuron if c in of_class]) for neuron in neurons]
            role: Literal["in", "out"] = "in" if place in consumed else "out"
            name, axis, groups = place
            touched.append(Site(name, axis, torch.from_numpy(np.stack(rows)), role, groups))
    main = next((site for site in touched if site.role == "out"), touched[0])
    return Group(main.parameter, len(neurons), tuple(touched))


def pinned_axes(labels: Labels, classes: Classes) -> dict[tuple[str, int], str]:
    """By axis, why it is pinned: the reason of its first pinned position. Axes that may move are left out."""
    reasons = {}
    for site, vector in labels.sites.items():
        pinned = [int(c) for c in dict.fromkeys(classes.of_label[vector].tolist()) if int(c) in classes.pinned]
        if pinned:
            reasons[site] = classes.pinned[pinned[0]]
    return reasons
