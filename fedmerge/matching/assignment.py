"""Linear sum assignment, simple and within blocks."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["assign", "assign_blocks", "total"]


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


def assign_blocks(direct: Tensor, kinds: list[Tensor]) -> tuple[Tensor, list[list[Tensor]]]:
    """Assign blocks whose members are assigned within them.

    Parameters
    ----------
    direct
        [H, H], what blocks themselves have in common.
    kinds
        For each kind of members [H, d, H, d], what they have in common.

    Returns
    -------
    tuple
        The permutation of blocks, and by kind and place of a block the permutation of its members.
    """
    blocks = len(direct)
    score, within = direct.double().clone(), []
    for members in kinds:
        pairs = [[assign(members[i, :, j]) for j in range(blocks)] for i in range(blocks)]
        score += torch.tensor(
            [[total(members[i, :, j], pairs[i][j]) for j in range(blocks)] for i in range(blocks)],
            dtype=torch.float64,
            device=score.device,
        )
        within.append(pairs)
    outer = assign(score)
    return outer, [[pairs[i][int(outer[i])] for i in range(blocks)] for pairs in within]
