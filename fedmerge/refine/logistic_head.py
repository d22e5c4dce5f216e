"""The output layer as the logistic regression of all clients' features, from head-sized gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.aggregators.base import check_range
from fedmerge.refine.base import Proposal, Refinement, Step, Sums
from fedmerge.refine.ridge_head import RidgeStep, head_matrix
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import HeadGradient, Statistic

__all__ = ["LogisticHead"]

_LENGTHS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0)
_PREFERRED = 4
_HISTORY = 6


@register("logistic_head", paper="beyond the ensemble, step 3")
@dataclass(frozen=True)
class LogisticHead(Refinement):
    """The head fitted to all clients' cross-entropy: ridge first, then quasi-Newton exchanges of the head's size.

    The ridge classifier is the start. Each exchange brings the gradient of the clients' loss by the head alone; the
    step is L-BFGS with the inverse of ``G (x) S``, the Fisher of the outputs times the features' moments, as its
    first Hessian (the fixed bound S/2 of Boehning 1992 takes about 30 exchanges where this takes six), its length
    chosen by held-out loss.

    Parameters
    ----------
    ridge, examples
        See :class:`~fedmerge.refine.ridge_head.RidgeHead`.
    exchanges
        Gradients asked for, at least 1; each costs a client 4 classes (d + classes) bytes.
    damping
        Added to both factors, in units of the mean of their diagonals, above 0.
    """

    ridge: float = 1e-3
    exchanges: int = 6
    damping: float = 1e-2
    examples: int | None = None

    def __post_init__(self) -> None:
        check_range(self, "ridge", 1e-12, float("inf"), open_high=True)
        check_range(self, "damping", 1e-12, float("inf"), open_high=True)
        check_range(self, "exchanges", 1, float("inf"), open_high=True)

    def steps(self, state: State) -> tuple[Step, ...]:
        """The ridge step and the gradient steps."""
        return (
            RidgeStep(self.ridge, self.examples),
            *(LogisticStep(self.damping, self.examples) for _ in range(self.exchanges)),
        )


@dataclass(frozen=True)
class LogisticStep(Step):
    """One quasi-Newton step of the head."""

    damping: float
    examples: int | None

    def needs(self) -> tuple[Statistic, ...]:
        """The gradient by the head."""
        return (HeadGradient(examples=self.examples),)

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """Several lengths along the quasi-Newton direction; the memory is S, the last head and gradient, and pairs."""
        found = sums["head_gradient"]
        weight = next(iter(found)).rpartition(".")[0]
        if f"{weight}.S" not in memory:  # the ridge step found no head to speak of
            return None, memory
        moments, gradient = memory[f"{weight}.S"], found[f"{weight}.gradient"]
        matrix = head_matrix(state, weight, moments)
        here = matrix.gather(state)[0].double()
        kept = dict(memory)
        pairs = memory.get("pairs", gradient.new_zeros(0, 2, *gradient.shape))
        if "head" in memory:
            moved, turned = here - memory["head"], gradient - memory["gradient"]
            if float((moved * turned).sum()) > 0:  # the loss is convex: no curvature only where nothing has moved
                pairs = torch.cat([pairs, torch.stack([moved, turned])[None]])[-_HISTORY:]
        kept |= {"head": here, "gradient": gradient, "pairs": pairs}
        inverses = [_inverse(factor, self.damping) for factor in (found[f"{weight}.G"], moments)]
        direction = -_two_loops(gradient, pairs, inverses[0], inverses[1])
        points = tuple((length,) for length in _LENGTHS)
        return Proposal((matrix.scatter(direction[None]),), points, _PREFERRED), kept


def _inverse(factor: Tensor, damping: float) -> Tensor:
    size = len(factor)
    inverse: Tensor = torch.linalg.inv(factor + damping * factor.trace() / size * torch.eye(size, dtype=factor.dtype))
    return inverse


def _two_loops(gradient: Tensor, pairs: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """The L-BFGS product of the inverse Hessian with a gradient (Nocedal 1980), started from ``outputs (x) inputs``."""
    q, shares = gradient, []
    for moved, turned in reversed(list(pairs)):
        share = (moved * q).sum() / (moved * turned).sum()
        shares.append(share)
        q = q - share * turned
    r = outputs @ q @ inputs
    for (moved, turned), share in zip(pairs, reversed(shares), strict=True):
        r = r + moved * (share - (turned * r).sum() / (moved * turned).sum())
    return torch.as_tensor(r)
