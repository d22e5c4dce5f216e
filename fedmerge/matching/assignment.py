"""Linear sum assignment, simple and within blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["Shared", "assign", "assign_blocks", "total"]

_TURNS = 8


def assign(similarity: Tensor) -> Tensor:
    """The permutation p that maximises ``sum_i similarity[i, p[i]]``.

    Examples
    --------
    >>> assign(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([1, 0])
    """
    return torch.from_numpy(_assigned(similarity.double().cpu().numpy()))


def _assigned(similarity: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    cost = similarity.max(1, keepdims=True, initial=-np.inf) - similarity
    cost -= cost.min(0, initial=np.inf)  # shorter paths to search, the same solution
    columns: np.ndarray[Any, Any] = linear_sum_assignment(cost)[1]
    return columns


def total(similarity: Tensor, perm: Tensor) -> float:
    """``sum_i similarity[i, p[i]]``."""
    return float(similarity.gather(1, perm[:, None].to(similarity.device)).sum())


@dataclass(frozen=True, eq=False)
class Shared:
    """What two models have where two kinds of members cross.

    Parameters
    ----------
    kinds
        The numbers of the two kinds.
    ours, theirs
        [H, n, m, f], features of each member of the first kind together with each of the second.
    distances
        Whether what they have in common is minus the squared distance, instead of the inner product.
    """

    kinds: tuple[int, int]
    ours: Tensor
    theirs: Tensor
    distances: bool = False

    @cached_property
    def arrays(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Both as arrays: there are H * H pairs of small ones, each step of which takes torch several times as long."""
        return self.ours.cpu().numpy(), self.theirs.cpu().numpy()

    def similarity(self, kind: int, place: int, block: int, other: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """[n, n] of members of one kind, those of the other kind being matched by `other`."""
        a, b = self.arrays[0][place], self.arrays[1][block]
        if kind == self.kinds[0]:
            b = b[:, other]
        else:
            a, b = a.swapaxes(0, 1), b.swapaxes(0, 1)[:, other]
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        products: np.ndarray[Any, Any] = a @ b.T
        if self.distances:
            products = 2 * products - np.square(a).sum(1)[:, None] - np.square(b).sum(1)
        return products.astype(np.float64)


def assign_blocks(
    direct: Tensor, kinds: list[Tensor], crossings: Sequence[Shared] = ()
) -> tuple[Tensor, list[list[Tensor]]]:
    """Assign blocks whose members are assigned within them.

    Parameters
    ----------
    direct
        [H, H], what blocks themselves have in common.
    kinds
        For each kind of members [H, d, H, d], what they have in common.
    crossings
        Where kinds cross, one is assigned after the other until nothing changes: those first that have most in
        common by themselves.

    Returns
    -------
    tuple
        The permutation of blocks, and by kind and place of a block the permutation of its members.
    """
    if not kinds:
        return assign(direct), []
    blocks = len(direct)
    score = direct.double().cpu().clone()
    arrays = [members.double().cpu().numpy() for members in kinds]
    within: list[list[list[Tensor]]] = [[[] for _ in range(blocks)] for _ in kinds]
    for i in range(blocks):
        for j in range(blocks):
            perms, value = _together([members[i, :, j] for members in arrays], crossings, i, j)
            score[i, j] += value
            for k, perm in enumerate(perms):
                within[k][i].append(torch.from_numpy(perm))
    outer = assign(score)
    return outer, [[pairs[i][int(outer[i])] for i in range(blocks)] for pairs in within]


def _together(
    own: list[np.ndarray[Any, Any]], crossings: Sequence[Shared], place: int, block: int
) -> tuple[list[np.ndarray[Any, Any]], float]:
    """Permutations of all kinds of members of two blocks, and what they have in common then."""
    perms = [_assigned(members) for members in own]
    if crossings:
        order = sorted(range(len(own)), key=lambda k: -float(np.abs(own[k]).sum()))
        settled = {k for k in order if own[k].any()} or set(order)
        for _ in range(_TURNS):
            before = list(perms)
            for k in order:
                assigned = own[k].copy()
                for part in crossings:
                    other = part.kinds[0] if part.kinds[1] == k else part.kinds[1]
                    if k in part.kinds and other in settled:
                        assigned += part.similarity(k, place, block, perms[other])
                perms[k] = _assigned(assigned)
                settled.add(k)
            if all(np.array_equal(p, q) for p, q in zip(perms, before, strict=True)):
                break
    value = sum(float(members[np.arange(len(p)), p].sum()) for members, p in zip(own, perms, strict=True))
    for part in crossings:
        a, b = part.kinds
        shared = part.similarity(a, place, block, perms[b])
        value += float(shared[np.arange(len(shared)), perms[a]].sum())
    return perms, value
