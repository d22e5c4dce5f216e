"""Clusters of neurons across and within models, by how much they correlate."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["zip_clusters"]

_NEVER = 1e9  # far below any similarity


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
    scores = similarity.double().cpu().clone()
    scores.fill_diagonal_(-torch.inf)
    place = torch.arange(len(scores))  # of each feature among the clusters that are left
    models = torch.nn.functional.one_hot(owner).bool()  # [clusters, models] which models are in a cluster
    room = (budget * torch.bincount(owner)).long()
    while len(scores) > clusters:
        partner, best = _best(scores, models, room)
        index = torch.arange(len(scores))
        mutual = (partner[partner] == index) & (index < partner) & torch.isfinite(best)
        chosen = mutual.nonzero().ravel()
        chosen = chosen[torch.argsort(best[chosen], descending=True)]
        smaller = _discounted(torch.minimum(scores[chosen], scores[partner[chosen]]), discount)
        shared = models[chosen] & models[partner[chosen]]
        # One pair after the other would first take a better pair that these make, and stop where budgets end.
        first = best[chosen] >= smaller.max()
        first &= ((shared.cumsum(0) <= room.clamp_min(0)) | ~shared).all(1)
        first[0] = True
        kept = chosen[first][: len(scores) - clusters]
        gone, smaller = partner[kept], smaller[first][: len(kept)]
        room -= (models[kept] & models[gone]).sum(0)
        scores[kept] = smaller
        scores[:, kept] = smaller.T
        pairs = _discounted(torch.minimum(smaller[:, kept], smaller[:, gone]), discount)
        scores[kept[:, None], kept[None]] = pairs
        scores.fill_diagonal_(-torch.inf)
        models[kept] |= models[gone]
        left = torch.ones(len(scores), dtype=torch.bool)
        left[gone] = False
        scores, models = scores[left][:, left], models[left]
        renamed = left.cumsum(0) - 1
        renamed[gone] = renamed[kept]
        place = renamed[place]
    found: Tensor = torch.unique(place, return_inverse=True)[1]
    return found


def _best(scores: Tensor, models: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Each cluster's best partner and how good it is, within a model only as far as there is room."""
    spent = models[:, room <= 0].double()
    allowed = torch.addmm(scores, spent, spent.T, alpha=-_NEVER) if spent.numel() else scores
    partner = torch.from_numpy(allowed.numpy().argmax(1))  # several times as fast as torch's
    best = allowed.gather(1, partner[:, None])[:, 0]
    if not (best > -_NEVER / 2).any():  # budgets are spent: only merging within a model is left
        partner = torch.from_numpy(scores.numpy().argmax(1))
        best = scores.gather(1, partner[:, None])[:, 0]
    return partner, torch.where(best > -_NEVER / 2, best, -torch.inf)


def _discounted(similarity: Tensor, discount: float) -> Tensor:
    return torch.where(similarity > 0, similarity * discount, similarity)
