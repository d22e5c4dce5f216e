"""Linear sum assignment, simple and within blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    cost = -similarity.double().cpu()
    cost -= cost.amin(1, keepdim=True)  # shorter paths to search, the same solution
    cost -= cost.amin(0)
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


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

    def similarity(self, kind: int, place: int, block: int, other: Tensor) -> Tensor:
        """[n, n] of members of one kind, those of the other kind being matched by `other`."""
        a, b = self.ours[place], self.theirs[block]
        if kind == self.kinds[0]:
            b = b[:, other]
        else:
            a, b = a.transpose(0, 1), b.transpose(0, 1)[:, other]
        a, b = a.flatten(1), b.flatten(1)
        if not self.distances:
            return (a @ b.T).double()
        return (2 * a @ b.T - a.square().sum(1)[:, None] - b.square().sum(1)).double()


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
    score = direct.double().clone()
    within: list[list[list[Tensor]]] = [[[] for _ in range(blocks)] for _ in kinds]
    for i in range(blocks):
        for j in range(blocks):
            own = [members[i, :, j] for members in kinds]
            perms, value = _together(own, crossings, i, j)
            score[i, j] += value
            for k, perm in enumerate(perms):
                within[k][i].append(perm)
    outer = assign(score)
    return outer, [[pairs[i][int(outer[i])] for i in range(blocks)] for pairs in within]


def _together(own: list[Tensor], crossings: Sequence[Shared], place: int, block: int) -> tuple[list[Tensor], float]:
    """Permutations of all kinds of members of two blocks, and what they have in common then."""
    perms = [assign(members) for members in own]
    if crossings:
        order = sorted(range(len(own)), key=lambda k: -float(own[k].abs().sum()))
        settled = {k for k in order if bool(own[k].any())} or set(order)
        for _ in range(_TURNS):
            before = [p.clone() for p in perms]
            for k in order:
                found = own[k].double().clone()
                for part in crossings:
                    other = part.kinds[0] if part.kinds[1] == k else part.kinds[1]
                    if k in part.kinds and other in settled:
                        found += part.similarity(k, place, block, perms[other])
                perms[k] = assign(found)
                settled.add(k)
            if all(torch.equal(p, q) for p, q in zip(perms, before, strict=True)):
                break
    value = sum(total(members, perm) for members, perm in zip(own, perms, strict=True))
    for part in crossings:
        a, b = part.kinds
        value += total(part.similarity(a, place, block, perms[b]), perms[a])
    return perms, value
