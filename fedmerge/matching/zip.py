"""Clusters of neurons across and within models, by how much they correlate."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["zip_clusters"]


def zip_clusters(similarity: Tensor, owner: Tensor, clusters: int, *, discount: float, budget: float) -> Tensor:
    """Merge the most similar features until `clusters` are left.

    Stoica et al. 2024: the similarity of a merged feature to any other is the smaller of its parts', times
    `discount` where positive. Pairs that are each other's best are merged together, many at a time, where merging
    one pair after the other would come to the same.

    Parameters
    ----------
    similarity
        [N, N], N features of all models together.
    owner
        [N], the model of each.
    clusters
        How many to leave.
    discount
        In (0, 1].
    budget
        Part of a model's features that may be merged within it, in [0, 1].

    Returns
    -------
    Tensor
        [N], the cluster of each feature.
    """
    number = len(similarity)
    scores = similarity.double().clone()
    scores.fill_diagonal_(-torch.inf)
    cluster = torch.arange(number)
    models = torch.nn.functional.one_hot(owner).bool()  # [clusters, models] which models are in a cluster
    room = (budget * torch.bincount(owner)).long()
    alive = number
    active = torch.ones(number, dtype=torch.bool)
    while alive > clusters:
        within = (models[:, None] & models[None]) & (room[None, None] <= 0)
        allowed = torch.where(within.any(2), -torch.inf, scores)
        best, partner = allowed.max(1)
        if not torch.isfinite(best).any():  # budgets are spent: only merging within a model is left
            best, partner = scores.max(1)
        index = torch.arange(number)
        mutual = (partner[partner] == index) & (index < partner) & torch.isfinite(best) & active
        chosen = mutual.nonzero().ravel()
        chosen = chosen[torch.argsort(best[chosen], descending=True)]
        smaller = _discounted(torch.minimum(scores[chosen], scores[partner[chosen]]), discount)
        shared = models[chosen] & models[partner[chosen]]
        # One pair after the other would first take a better pair that these make, and stop where budgets end.
        first = best[chosen] >= smaller.max()
        first &= ((shared.cumsum(0) <= room.clamp_min(0)) | ~shared).all(1)
        first[0] = True
        kept = chosen[first][: alive - clusters]
        gone, smaller = partner[kept], smaller[first][: alive - clusters]
        room -= (models[kept] & models[gone]).sum(0)
        scores[kept] = smaller
        scores[:, kept] = smaller.T
        pairs = _discounted(torch.minimum(smaller[:, kept], smaller[:, gone]), discount)
        scores[kept[:, None], kept[None]] = pairs
        scores[gone], scores[:, gone] = -torch.inf, -torch.inf
        scores.fill_diagonal_(-torch.inf)
        models[kept] |= models[gone]
        models[gone] = False
        active[gone] = False
        renamed = torch.arange(number)
        renamed[gone] = kept
        cluster = renamed[cluster]
        alive -= len(kept)
    found: Tensor = torch.unique(cluster, return_inverse=True)[1]
    return found


def _discounted(similarity: Tensor, discount: float) -> Tensor:
    return torch.where(similarity > 0, similarity * discount, similarity)
