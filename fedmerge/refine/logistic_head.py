"""The output layer as the logistic regression of all clients' features, from head-sized gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.lookup.option_checks import check_range
from fedmerge.refine.refinement import Proposal, Refinement, Step, Sums
from fedmerge.refine.ridge_head import head_of, ridge_proposal
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import HeadGradient, HeadSums, Statistic

__all__ = ["LogisticHead"]

_LENGTHS = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
_FIRST = 0.25
"""Of the unit step: the Kronecker product of means understates the curvature that confident examples do not have."""
_HISTORY = 6
_GAIN = 1e-3
"""Of the held-out loss; exchanges that gain less are not worth another."""


@register("logistic_head", paper="docs/beyond.md")
@dataclass(frozen=True)
class LogisticHead(Refinement):
    """The head fitted to all clients' cross-entropy: ridge first, then quasi-Newton exchanges of the head's size.

    The start is the ridge classifier or the head as it is, whichever the clients' held-out examples prefer. Each
    further exchange brings the gradient of the clients' loss by the head alone; the step is L-BFGS with the inverse of
    ``G (x) S``, the Fisher of the outputs times the features' moments, as its first Hessian (the fixed bound S/2 of
    Boehning 1992 takes about 30 exchanges for what this does in four), its length chosen by held-out loss. It ends
    early where a step gains less than a thousandth.

    Parameters
    ----------
    ridge, examples
        See :class:`~fedmerge.refine.ridge_head.RidgeHead`.
    exchanges
        Gradients asked for at most, at least 1; each costs a client 4 classes (d + classes) bytes.
    damping
        Added to both factors, in units of the mean of their diagonals, above 0.
    """

    ridge: float = 1e-3
    exchanges: int = 4
    damping: float = 1e-2
    examples: int | None = None

    fits_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, "ridge", 1e-12, float("inf"), open_high=True)
        check_range(self, "damping", 1e-12, float("inf"), open_high=True)
        check_range(self, "exchanges", 1, float("inf"), open_high=True)

    def steps(self, state: State) -> tuple[Step, ...]:
        """The start and the gradient steps."""
        return (
            LogisticStart(self.damping, self.examples, self.ridge),
            *(LogisticStep(self.damping, self.examples) for _ in range(self.exchanges - 1)),
        )


@dataclass(frozen=True)
class LogisticStep(Step):
    """One quasi-Newton step of the head; the memory is S, the last head and gradient, and pairs of differences."""

    damping: float
    examples: int | None

    def wanted(self, losses: Tensor, memory: State) -> bool:
        """While there is a head, and the last step gained something."""
        return bool(memory) and (not len(losses) or float(losses.min()) < (1 - _GAIN) * float(losses[0]))

    def needs(self) -> tuple[Statistic, ...]:
        """The gradient by the head."""
        return (HeadGradient(examples=self.examples),)

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """Several lengths along the quasi-Newton direction."""
        direction, kept, length = self._direction(state, sums["head_gradient"], memory)
        points = ((0.0,), *((step_length,) for step_length in _LENGTHS))
        return Proposal((direction,), points, 1 + _LENGTHS.index(length)), kept

    def _direction(
        self, state: State, statistics: Mapping[str, Tensor], memory: State
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        """The direction by parameter, the memory, and the length that is likely best."""
        moments = memory["moments"]
        matrix = head_of(state, statistics, moments)
        gradient, outer = statistics[f"{matrix.weight}.gradient"], statistics[f"{matrix.weight}.G"]
        here = matrix.gather(state)[0].double()
        pairs = memory.get("pairs", gradient.new_zeros(0, 2, *gradient.shape))
        if "head" in memory:
            moved, turned = here - memory["head"], gradient - memory["gradient"]
            if float((moved * turned).sum()) > 0:  # the loss is convex: no curvature only where nothing has moved
                pairs = torch.cat([pairs, torch.stack([moved, turned])[None]])[-_HISTORY:]
        inverses = _inverse(outer, self.damping), _inverse(moments, self.damping)
        direction = -_two_loops(gradient, pairs, *inverses)
        kept = {"moments": moments, "head": here, "gradient": gradient, "pairs": pairs}
        return matrix.scatter(direction[None]), kept, 1.0 if len(pairs) else _FIRST


@dataclass(frozen=True)
class LogisticStart(LogisticStep):
    """The ridge classifier, or the first quasi-Newton step of the head as it is."""

    ridge: float

    def wanted(self, losses: Tensor, memory: State) -> bool:
        """Always."""
        return True

    def needs(self) -> tuple[Statistic, ...]:
        """Moments of features, and the gradient."""
        return HeadSums(examples=self.examples), HeadGradient(examples=self.examples)

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """Scales of the one and lengths of the other; what was learnt of the head before is of other features."""
        ridge, moments = ridge_proposal(state, sums["head_sums"], self.ridge)
        direction, kept, _ = self._direction(state, sums["head_gradient"], {"moments": moments})
        own = (0.0,) * len(ridge.directions)
        points = (*((*point, 0.0) for point in ridge.points), *((*own, length) for length in _LENGTHS))
        return Proposal((*ridge.directions, direction), points, ridge.preferred), kept


def _inverse(factor: Tensor, damping: float) -> Tensor:
    size = len(factor)
    identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.inv(factor + damping * factor.trace() / size * identity)
    return inverse


def _two_loops(gradient: Tensor, pairs: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """The L-BFGS product of the inverse Hessian with a gradient (Nocedal 1980), started from ``outer (x) inner``.

    The start is scaled to what the last pair says of the curvature along it (Nocedal and Wright 2006, eq. 7.20).
    """
    q, shares = gradient, []
    for moved, turned in reversed(list(pairs)):
        share = (moved * q).sum() / (moved * turned).sum()
        shares.append(share)
        q = q - share * turned
    r = outer @ q @ inner
    if len(pairs):
        moved, turned = pairs[-1]
        r = r * ((moved * turned).sum() / (turned * (outer @ turned @ inner)).sum())
    for (moved, turned), share in zip(pairs, reversed(shares), strict=True):
        r = r + moved * (share - (turned * r).sum() / (moved * turned).sum())
    return torch.as_tensor(r)
