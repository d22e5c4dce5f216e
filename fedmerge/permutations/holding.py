"""Symmetries that leave some tensors as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from fedmerge.permutations.spec import PermutationSpec

__all__ = ["held"]


def held(spec: PermutationSpec, names: Collection[str], reason: str = "it is frozen") -> PermutationSpec:
    """`spec` without the groups that stand in any of these tensors.

    Parameters
    ----------
    spec
        Of a model.
    names
        Tensors that must not move, under any of their names.
    reason
        Why, for ``pinned``.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.permutations import trace
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    >>> [group.name for group in held(trace(model, torch.zeros(2, 4)), {"0.weight"}).groups]
    ['1.weight']
    """
    fixed = {spec.aliases.get(name, name) for name in names}
    touched = {i for i, group in enumerate(spec.groups) if any(site.parameter in fixed for site in group.sites)}
    while True:  # blocks move all that is in them
        blocks = {i for i, g in enumerate(spec.groups) if any(j in touched for block in g.inner for j in block)}
        if blocks <= touched:
            break
        touched |= blocks
    if not touched:
        return spec
    kept = [i for i in range(len(spec.groups)) if i not in touched]
    place = {i: new for new, i in enumerate(kept)}
    groups = [
        replace(spec.groups[i], inner=tuple(tuple(place[j] for j in block) for block in spec.groups[i].inner))
        for i in kept
    ]
    return replace(spec, groups=tuple(groups), pinned={**spec.pinned, **_pins(spec, touched, reason)})


def _pins(spec: PermutationSpec, touched: Collection[int], reason: str) -> Mapping[tuple[str, int], str]:
    return {(site.parameter, site.axis): reason for i in sorted(touched) for site in spec.groups[i].sites}
