"""Clusters of neurons across and within models, by how much they correlate."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["zip_clusters"]

_NEVER = 1e9  # far below any similarity


def zip_clusters(similarity: Tensor, owner: Tensor, clusters: int, *, discount: float, budget: float) -> Tensor:
    """Merge the most similar features until `clusters` are left.

    Stoica et al. 2024: the similarity of a merged feature to any other is the smaller of its parts', times
    `discount` where positive. Theirs is written for two models, in which a merged feature that is merged again
    takes in a second feature of one of them. Here that is what the discount is on: with three models and more, a
    cluster takes in one feature of each before it is discounted, or twins of the third model would lose against
    weak pairs within it. Pairs that are each other's best are merged together, many at a time, where merging one
    pair after the other would come to the same.

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
    state = _Clusters(similarity, owner, discount)
    place = torch.arange(len(similarity))  # of each feature among the clusters that are left
    room = (budget * torch.bincount(owner)).long()
    while len(state.scores) > clusters:
        partner, best = _best(state.scores, state.models, room)
        index = torch.arange(len(state.scores))
        mutual = (partner[partner] == index) & (index < partner) & torch.isfinite(best)
        chosen = mutual.nonzero().ravel()
        chosen = chosen[torch.argsort(best[chosen], descending=True)]
        highest = state.highest_after(chosen, partner[chosen])
        shared = state.models[chosen] & state.models[partner[chosen]]
        # One pair after the other would first take a better pair that these make, and stop where budgets end.
        first = best[chosen] >= highest
        first &= ((shared.cumsum(0) <= room.clamp_min(0)) | ~shared).all(1)
        first[0] = True
        kept = chosen[first][: len(state.scores) - clusters]
        gone = partner[kept]
        room -= (state.models[kept] & state.models[gone]).sum(0)
        renamed = state.merge(kept, gone)
        place = renamed[place]
    numbers: Tensor = torch.unique(place, return_inverse=True)[1]
    return numbers


class _Clusters:
    """Similarities of clusters, and which models are in each."""

    def __init__(self, similarity: Tensor, owner: Tensor, discount: float) -> None:
        self._discount = discount
        self.scores = similarity.double().cpu().clone()
        self.scores.fill_diagonal_(-torch.inf)
        several = int(owner.max()) > 1 and discount < 1
        # With two models whatever has been merged is discounted, so that there is nothing else to remember.
        self._plain = self.scores.clone() if several else None
        self._reduced = self.scores.clone() if several else None
        self.models = torch.nn.functional.one_hot(owner).bool()  # [clusters, models]
        self._twice = torch.zeros(len(owner), dtype=torch.bool)  # has more than one feature of some model

    def _rows(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """What the clusters ``a[k]`` and ``b[k]`` together have in common with all: as it counts, and its parts."""
        if self._plain is None or self._reduced is None:
            return (self._discounted(torch.minimum(self.scores[a], self.scores[b])),)
        plain = torch.minimum(self._plain[a], self._plain[b])
        reduced = self._discounted(torch.minimum(self._reduced[a], self._reduced[b]))
        return self._counting(plain, reduced, a, b), plain, reduced

    def _counting(self, plain: Tensor, reduced: Tensor, a: Tensor, b: Tensor) -> Tensor:
        models, twice = self._united(a, b)
        overlap = (models.float() @ self.models.float().T > 0) | twice[:, None] | self._twice
        return torch.where(overlap, reduced, plain)

    def _united(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        twice = self._twice[a] | self._twice[b] | (self.models[a] & self.models[b]).any(1)
        return self.models[a] | self.models[b], twice

    def highest_after(self, a: Tensor, b: Tensor) -> float:
        """How similar to anything the clusters would be that merging ``a[k]`` with ``b[k]`` made."""
        return float(self._rows(a, b)[0].max())

    def merge(self, kept: Tensor, gone: Tensor) -> Tensor:
        """Merge each ``gone[k]`` into ``kept[k]``; the new numbers of all clusters."""
        rows = self._rows(kept, gone)
        self.models[kept], self._twice[kept] = self._united(kept, gone)
        matrices = [m for m in (self.scores, self._plain, self._reduced) if m is not None]
        for matrix, merged in zip(matrices, rows, strict=True):
            matrix[kept], matrix[:, kept] = merged, merged.T
        # Between two new clusters, what either says of the other's parts.
        if self._plain is None or self._reduced is None:
            pairs: tuple[Tensor, ...] = (self._between(rows[0], kept, gone, self._discount),)
        else:
            plain = self._between(rows[1], kept, gone, 1.0)
            reduced = self._between(rows[2], kept, gone, self._discount)
            models, twice = self.models[kept], self._twice[kept]
            overlap = (models.float() @ models.float().T > 0) | twice[:, None] | twice
            pairs = torch.where(overlap, reduced, plain), plain, reduced
        left = torch.ones(len(self.scores), dtype=torch.bool)
        left[gone] = False
        shrunk = []
        for matrix, merged in zip(matrices, pairs, strict=True):
            matrix[kept[:, None], kept[None]] = merged
            matrix.fill_diagonal_(-torch.inf)
            shrunk.append(matrix[left][:, left])
        self.scores = shrunk[0]
        if len(shrunk) > 1:
            self._plain, self._reduced = shrunk[1:]
        self.models, self._twice = self.models[left], self._twice[left]
        renamed = left.cumsum(0) - 1
        renamed[gone] = renamed[kept]
        return renamed

    def _between(self, rows: Tensor, kept: Tensor, gone: Tensor, discount: float) -> Tensor:
        smaller = torch.minimum(rows[:, kept], rows[:, gone])
        return torch.where(smaller > 0, smaller * discount, smaller)

    def _discounted(self, similarity: Tensor) -> Tensor:
        return torch.where(similarity > 0, similarity * self._discount, similarity)


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
