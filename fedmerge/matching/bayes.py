"""Nonparametric Bayesian matching: neurons of many models to a global layer that grows where it has to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["GlobalLayer", "match_bayes", "readiness"]

_LEAST = 50.0  # readiness to add neurons: clients with like data gain from some, too
_POPULAR = 10  # clients of a neuron beyond which it attracts no more, as in the authors' code


@dataclass
class GlobalLayer:
    """The global neurons, and which of them each client's neurons are.

    Parameters
    ----------
    assignments
        For each client [n_j], indices of global neurons.
    size
        How many global neurons there are.
    """

    assignments: list[Tensor] = field(default_factory=list)
    size: int = 0


def match_bayes(
    features: Sequence[Tensor],
    precisions: Sequence[Tensor],
    *,
    sigma0: float,
    gamma: float,
    sweeps: int,
    max_width: int | None = None,
    generator: torch.Generator | None = None,
) -> GlobalLayer:
    """Match the neurons of all clients to global ones by maximum a posteriori, one client at a time.

    Yurochkin et al. 2019, eqs. 5 to 9, with a prior mean of 0: the global neuron i, seen by the clients C_i, has
    ``g_i = sum_{j in C_i} s_j v_j`` and precision ``S_i = 1/sigma0 + sum_{j in C_i} s_j``. Neuron v of client j
    gains ``sum_d (g + s v)^2 / (S + s) - g^2 / S + log(m / (J - m))`` by joining a neuron that m others share,
    and ``sum_d (s v)^2 / (1/sigma0 + s) - 2 log k + 2 log(gamma / J)`` by founding the k-th new one.

    Parameters
    ----------
    features
        For each client [n_j, D].
    precisions
        For each client [D], ``s_j``.
    sigma0
        Variance of the prior.
    gamma
        Readiness to found new neurons, relative to the number of clients.
    sweeps
        How often each client is taken out and matched anew, in random order.
    max_width
        No client founds neurons beyond this number, or one where it is reached, unless it must.
    generator
        For the order of clients.
    """
    count = len(features)
    order = sorted(range(count), key=lambda j: (-len(features[j]), j))
    layer = _Layer(features[0], sigma0, gamma, count, max_width)
    feats = list(features)
    precs = [p.to(f) for p, f in zip(precisions, feats, strict=True)]
    for j in order:
        layer.join(j, feats[j], precs[j])
    for _ in range(sweeps):
        before = [layer.assignments[j] for j in order]
        for j in torch.randperm(count, generator=generator).tolist():
            layer.leave(j, feats[j], precs[j])
            layer.join(j, feats[j], precs[j])
        after = [layer.assignments[j] for j in order]
        numbers = _by_appearance(before), _by_appearance(after)
        if all(torch.equal(numbers[0][a], numbers[1][b]) for a, b in zip(before, after, strict=True)):
            break
    numbered = _by_appearance([layer.assignments[j] for j in order])
    return GlobalLayer([numbered[layer.assignments[j]] for j in range(count)], len(layer.counts))


def readiness(counts: Tensor | None, width: float) -> float:
    """How ready a layer should be to add neurons, by how far the clients' classes overlap.

    In the Indian buffet process with concentration c and `width` neurons per client, two clients share
    ``1 / (1 + c)`` of their neurons, and the J-th client adds ``width c / (c + J - 1)`` new ones: ``gamma / J`` in
    :func:`match_bayes`. Here c is such that clients share as large a part of their neurons as of their
    distributions of classes (on average over pairs, ``sum_c min(p_c, q_c)``). Clients without a common class share
    nothing, with gamma = J width. It is at least 50.

    Parameters
    ----------
    counts
        [clients, classes], or None where they are not known.
    width
        Mean number of neurons of a client.

    Examples
    --------
    >>> readiness(torch.tensor([[5, 5], [8, 8]]), 100), readiness(torch.tensor([[9, 0], [0, 3]]), 100)
    (50.0, 200.0)
    """
    if counts is None:
        return _LEAST
    seen = counts.double().cpu()
    parts = seen / seen.sum(1, keepdim=True).clamp_min(1)
    clients = len(parts)
    both = torch.minimum(parts[:, None], parts).sum(2)
    overlap = float((both.sum() - both.diagonal().sum()) / max(clients * (clients - 1), 1))
    return max(_LEAST, width * clients * (1 - overlap) / (1 - overlap + overlap * (clients - 1)))


def _by_appearance(assignments: Sequence[Tensor]) -> Tensor:
    """New numbers of global neurons: those of the first client in its order, then what others add."""
    flat = torch.cat(list(assignments))
    first = torch.full((int(flat.max()) + 1,), len(flat))
    first.scatter_reduce_(0, flat, torch.arange(len(flat)), "amin")
    return torch.argsort(torch.argsort(first))


class _Layer:
    def __init__(self, like: Tensor, sigma0: float, gamma: float, clients: int, cap: int | None) -> None:
        self.prior, self.gamma, self.clients, self.cap = 1 / sigma0, gamma, clients, cap
        self.sums = like.new_zeros(0, like.shape[1])
        self.precisions = like.new_zeros(0, like.shape[1])
        self.counts = torch.zeros(0, dtype=torch.long)
        self.assignments: dict[int, Tensor] = {}

    def join(self, client: int, v: Tensor, s: Tensor) -> None:
        known = len(self.counts)
        room = len(v) if self.cap is None else min(len(v), max(self.cap - known, 0))
        room = max(room, len(v) - known)
        scaled = v * s
        weights = scaled.square() @ (1 / (self.prior + s))
        new = weights[:, None] + 2 * math.log(self.gamma / self.clients) - 2 * torch.arange(1, room + 1).log().to(v)
        gains = torch.cat([self._gains(scaled, s), new], 1)
        _, columns = linear_sum_assignment(gains.double().cpu().numpy(), maximize=True)
        assigned = torch.from_numpy(columns)
        fresh = assigned >= known
        assigned[fresh] = known + torch.arange(int(fresh.sum()))
        more = int(fresh.sum())
        self.sums = torch.cat([self.sums, self.sums.new_zeros(more, v.shape[1])])
        self.precisions = torch.cat([self.precisions, self.precisions.new_full((more, v.shape[1]), self.prior)])
        self.counts = torch.cat([self.counts, self.counts.new_zeros(more)])
        self._move(assigned, scaled, s, 1)
        self.assignments[client] = assigned

    def leave(self, client: int, v: Tensor, s: Tensor) -> None:
        self._move(self.assignments.pop(client), v * s, s, -1)
        kept = self.counts > 0
        renumbered = kept.cumsum(0) - 1
        self.counts = self.counts[kept]
        self.sums, self.precisions = self.sums[kept.to(v.device)], self.precisions[kept.to(v.device)]
        self.assignments = {j: renumbered[a] for j, a in self.assignments.items()}

    def _move(self, assigned: Tensor, scaled: Tensor, s: Tensor, sign: int) -> None:
        where = assigned.to(scaled.device)
        self.sums.index_add_(0, where, scaled, alpha=sign)
        self.precisions.index_add_(0, where, s.expand_as(scaled), alpha=sign)
        self.counts.index_add_(0, assigned, torch.ones_like(assigned), alpha=sign)

    def _gains(self, scaled: Tensor, s: Tensor) -> Tensor:
        """[n, L], the square written out so that it is two matrix products."""
        joint = 1 / (self.precisions + s)
        constant = -(self.sums.square() * joint * (s / self.precisions)).sum(1)
        gains = scaled.square() @ joint.T + 2 * scaled @ (self.sums * joint).T + constant
        popular = self.counts.clamp(max=min(_POPULAR, max(self.clients - 1, 1))).to(gains)
        return gains + (popular / (self.clients - popular).clamp_min(0.5)).log()
