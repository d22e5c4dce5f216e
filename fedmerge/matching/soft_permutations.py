"""Permutations learnt by gradient descent: doubly stochastic matrices that become hard at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmerge.matching.assignment import assign
from fedmerge.matching.units import units
from fedmerge.matching.weight_costs import match_weights
from fedmerge.permutations.carrying import Plan, transport
from fedmerge.permutations.spec import PermutationSpec
from fedmerge.state import State, accumulator_dtype

__all__ = ["learn_permutations", "sinkhorn"]

_SAME = 1e-12  # of both models' squares: nearer than that, they are one


def sinkhorn(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    """A matrix whose rows and columns sum to one, near the permutation of the largest scores.

    ``exp(scores / temperature)``, its rows and its columns scaled in turns, in logarithms.

    Parameters
    ----------
    scores
        [n, n].
    temperature
        Above 0; the smaller, the harder the matrix.
    iterations
        Turns; columns sum to one exactly, rows the better the more there are.

    Examples
    --------
    >>> sinkhorn(torch.tensor([[9.0, 0.0], [8.0, 1.0]]), 1.0, 20).round(decimals=3)
    tensor([[0.7310, 0.2690],
            [0.2690, 0.7310]])
    """
    logs = scores / temperature
    for _ in range(iterations):
        logs = logs - logs.logsumexp(1, keepdim=True)
        logs = logs - logs.logsumexp(0, keepdim=True)
    return logs.exp()


def learn_permutations(
    spec: PermutationSpec,
    a: State,
    b: State,
    *,
    steps: int,
    learning_rate: float,
    temperature: float,
    iterations: int,
) -> tuple[list[Tensor], float]:
    """Permutations of `b` that bring it near `a`, from scores that AdamW learns.

    The loss is ``||a - P(b)||^2`` over tensors that have neurons, relative to ``||a||^2``, where P is soft. After every
    step the scores are rounded by assignment, and the hard matching with the least loss is kept. The identity is one of
    them. Blocks (heads of attention, groups of a norm), and what crosses other groups, are matched by inner products
    of weights before and stay.

    Parameters
    ----------
    spec
        The symmetries of both models.
    a, b
        Parameters.
    steps
        Of AdamW.
    learning_rate
        Of AdamW, in units of scores.
    temperature, iterations
        See :func:`sinkhorn`.

    Returns
    -------
    tuple
        The permutations, and their loss.
    """
    names = [n for n in dict.fromkeys(n for n, _ in spec.touching) if n in a and n in b and n not in spec.aliases]
    dtype = accumulator_dtype(next(iter(a.values())).dtype) if a else torch.float32
    ours, theirs = ({n: s[n].detach().to(dtype) for n in names} for s in (a, b))
    size = sum(float(t.double().square().sum()) for t in ours.values()) or 1.0

    def loss_of(perms: Sequence[Tensor]) -> float:
        return float(_distance(ours, spec.apply(theirs, perms)).double()) / size

    best = spec.identity()
    reached = loss_of(best) if names else 0.0
    if reached <= _SAME:
        return best, reached
    simple = [unit for unit in units(spec) if unit.simple]
    fixed = spec.identity()
    if len(simple) < len(units(spec)):
        learnt = {unit.index for unit in simple}
        matched, _ = match_weights(spec, ours, theirs)
        fixed = [torch.arange(len(p)) if i in learnt else p for i, p in enumerate(matched)]
        theirs = spec.apply(theirs, fixed)
    device = next(iter(ours.values())).device
    scores = {u.index: torch.zeros(u.size, u.size, dtype=dtype, device=device, requires_grad=True) for u in simple}
    seen: list[Tensor] | None = None
    original = {n: b[n].detach().to(dtype) for n in names}
    optimiser = torch.optim.AdamW(list(scores.values()), learning_rate) if scores else None
    for step in range(steps + 1):
        if optimiser is not None and step:
            with torch.enable_grad():
                optimiser.zero_grad()
                plans = {i: Plan(p, p) for i, p in _soft(scores, temperature, iterations).items()}
                (_distance(ours, transport(spec, theirs, plans)) / size).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        perms = [assign(scores[i].detach()) if i in scores and step else p for i, p in enumerate(fixed)]
        if seen is None or any(not torch.equal(p, q) for p, q in zip(perms, seen, strict=True)):
            seen, loss = perms, float(_distance(ours, spec.apply(original, perms)).double()) / size
            if loss < reached:
                best, reached = perms, loss
        if optimiser is None:
            break
    return best, reached


def _soft(scores: Mapping[int, Tensor], temperature: float, iterations: int) -> dict[int, Tensor]:
    return {i: sinkhorn(own, temperature, iterations) for i, own in scores.items()}


def _distance(a: State, b: State) -> Tensor:
    """``||a - b||^2``."""
    return torch.stack([(t - b[n]).square().sum() for n, t in a.items()]).sum()
