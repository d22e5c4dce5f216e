"""Optimal transport between the neurons of two layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedmerge.matching.assignment import assign
from fedmerge.permutations.carrying import Plan

__all__ = ["Solver", "coupling", "distances", "mass", "plan_of"]

_NOTHING = torch.finfo(torch.float64).tiny
_COLUMNS = 1024  # turned into float64 at a time

Solver = Literal["emd", "sinkhorn"]


def distances(a: Tensor, b: Tensor) -> Tensor:
    """[n_a, n_b] Euclidean, float64; of the features only a part at a time, as copies would outgrow the models.

    Examples
    --------
    >>> distances(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 4.0]]))
    tensor([[4.],
            [5.]], dtype=torch.float64)
    """
    squares = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for columns, other in zip(torch.split(a, _COLUMNS, 1), torch.split(b, _COLUMNS, 1), strict=True):
        x, y = columns.double(), other.double()
        squares += x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squares.clamp_min(0).sqrt()


def mass(features: Tensor, importance: Literal["uniform", "l1", "l2"]) -> Tensor:
    """[n], how much each neuron weighs, summing to 1."""
    if importance == "uniform" or not features.numel():
        weights = torch.ones(len(features), dtype=torch.float64)
    else:
        weights = features.double().norm(p=1 if importance == "l1" else 2, dim=1).cpu()
        weights += 1e-12 + 1e-6 * weights.mean()  # a dead neuron has to go somewhere as well
    return weights / weights.sum()


def coupling(cost: Tensor, mass_a: Tensor, mass_b: Tensor, solver: Solver, regularization: float) -> Tensor:
    """[n_a, n_b] transport with these marginals that costs least, float64.

    Exact by the network simplex, or by assignment where all neurons weigh the same, which has the same solution;
    or regularised by entropy, in the log domain, `regularization` being relative to the largest cost.
    """
    import ot  # noqa: PLC0415 - it takes a second, which those who do not transport should not pay

    cost = cost.double().cpu()
    if solver == "sinkhorn":
        scaled = cost / cost.max().clamp_min(_NOTHING)
        plan = ot.sinkhorn(
            mass_a.numpy(),
            mass_b.numpy(),
            scaled.numpy(),
            regularization,
            method="sinkhorn_log",
            numItermax=2000,
            warn=False,
        )
        return torch.from_numpy(plan)
    if len(mass_a) == len(mass_b) and torch.equal(mass_a, mass_b) and bool((mass_a == mass_a[0]).all()):
        plan = torch.zeros_like(cost)
        plan[torch.arange(len(cost)), assign(-cost)] = 1 / len(cost)
        return plan
    scaled = cost / cost.max().clamp_min(_NOTHING)  # the same transport, and a scale that the simplex is written for
    return torch.from_numpy(ot.emd(mass_a.numpy(), mass_b.numpy(), scaled.numpy(), numItermax=1_000_000))


def plan_of(coupling_matrix: Tensor) -> Plan:
    """From a coupling [n_a, n_b], how the neurons of b become n_a: each new one is a mean of old ones."""
    produce = coupling_matrix / coupling_matrix.sum(1, keepdim=True).clamp_min(1e-300)
    consume = coupling_matrix / coupling_matrix.sum(0, keepdim=True).clamp_min(1e-300)
    return Plan(produce, consume)
