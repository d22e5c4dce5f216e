"""Second-order steps of the whole merged model on the clients' summed loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.questions import Question
from fedmerge.refine.refinement import Proposal, Refinement, Step, Sums
from fedmerge.refine.second_order import blocks, coefficients, natural_direction
from fedmerge.registry import register
from fedmerge.state import State, cast_like, prefixed, with_prefix
from fedmerge.statistics import FisherKfac, LossGradient, Secants, Statistic

__all__ = ["NaturalGradient"]

_TRUSTS = (0.01, 0.1, 1.0, 10.0)
_LIKELY = 0.1
_LENGTHS = (0.25, 0.5, 1.0)
_EXAMPLES = 500
"""Of each client, for a few dozen numbers."""
_FINE = 1.1
_FACTOR, _BEGAN, _DIRECTION = "factor", "began", "direction"


@register("natural_gradient", paper="arXiv:1503.05671")
@dataclass(frozen=True)
class NaturalGradient(Refinement):
    """Natural-gradient steps: an optimiser's, not a merge's, at the merged model and from the clients' sums.

    At the merged model clients send the gradient g of their loss and Kronecker factors A, G; layer by layer
    ``D = -(G + d_G I)^-1 g (A + d_A I)^-1`` with factored Tikhonov damping (Martens and Grosse 2015, section 6.3),
    ``d_A d_G = damping * tr(A) tr(G) / sizes``, and diagonal Fishers where a layer has no factors. How far to go is
    not left to one length: the directions of all dampings, cut into blocks of layers, and those of the step before
    span a subspace; clients send slope and Gauss-Newton curvature along it (:class:`~fedmerge.statistics.Secants`,
    after section 6.4 there), and the quadratic is minimised with several Levenberg-Marquardt factors. The point with
    the least loss on examples that the clients held out is taken; standing still is among them, for at a model that
    fits its training data already such a step can only do harm.

    Parameters
    ----------
    count
        How many steps, at least 1.
    dampings
        Of the directions; each costs a model's bytes downwards.
    solves
        How often slope and curvature are measured in a step, at least 1: again where the first minimum lies.
    examples
        At most so many of each client for the factors; the gradient takes all.
    refresh
        Whether factors are measured at every step, or at the first only.
    """

    count: int = 1
    dampings: tuple[float, ...] = (0.1, 1.0, 10.0)
    solves: int = 1
    examples: int | None = 2000
    refresh: bool = True

    def __post_init__(self) -> None:
        check_range(self, "count", 1, float("inf"), open_high=True)
        check_range(self, "solves", 1, float("inf"), open_high=True)
        if not self.dampings or min(self.dampings) <= 0:
            raise InvalidOption(f"NaturalGradient: dampings must be positive numbers, got {self.dampings}")

    def steps(self, state: State) -> tuple[Step, ...]:
        """Directions and lengths, as often as asked for."""
        dampings = tuple(self.dampings)
        full, again = NaturalStep(dampings, self.examples), GradientStep(dampings)
        after = (SecantStep(),) * self.solves
        firsts = [full if self.refresh or not i else again for i in range(self.count)]
        return tuple(step for first in firsts for step in (first, *after))


@dataclass(frozen=True)
class GradientStep(Step):
    """Directions by the factors of a step before; the memory is factors, directions, and where the step began."""

    expensive: ClassVar[bool] = True

    dampings: tuple[float, ...]

    def wanted(self, losses: Tensor, memory: State) -> bool:
        """Where there are factors, and the step before has gone anywhere."""
        return bool(prefixed(_FACTOR, memory)) and not _declined(losses)

    def needs(self) -> tuple[Statistic, ...]:
        """The gradient."""
        return (LossGradient(),)

    def least(self, state: State) -> int:
        """The gradient in 8 bits."""
        return sum(tensor.numel() for tensor in state.values())

    def most(self, state: State) -> float:
        """Finer gradients are no better."""
        return _FINE * self.least(state)

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """No model yet, but directions."""
        gradient = sums["loss_gradient"]
        factors = sums.get("fisher_kfac") or prefixed(_FACTOR, memory)
        starts = [name.removesuffix(".A") for name in factors if name.endswith(".A")]
        spanned: list[dict[str, Tensor]] = []
        for damping in self.dampings:
            spanned += blocks(_in_order(natural_direction(state, gradient, factors, damping), state), starts)
        if spanned:  # how sure the model is, which a ridge classifier may get wrong
            spanned.append({name: state[name].double() for name in spanned[-1]})
        began = prefixed(_BEGAN, memory)
        if began:  # as conjugate gradients keep the step before
            moved = {name: state[name].double() - began[name].double() for name in state if name in began}
            spanned += [block for block in blocks(moved, starts) if any(bool(t.any()) for t in block.values())]
        names = {name for direction in spanned for name in direction}
        kept = with_prefix(_FACTOR, factors) | with_prefix(_BEGAN, {n: t for n, t in state.items() if n in names})
        for number, direction in enumerate(spanned):
            kept |= with_prefix(f"{_DIRECTION}{number:04d}", cast_like(direction, state))
        return None, kept


@dataclass(frozen=True)
class NaturalStep(GradientStep):
    """Directions by factors that are measured at the model as it is: those of a merge are no preconditioner here."""

    examples: int | None

    def wanted(self, losses: Tensor, memory: State) -> bool:
        """Unless the step before has gone nowhere: this one would do the same."""
        return not (prefixed(_FACTOR, memory) and _declined(losses))

    def needs(self) -> tuple[Statistic, ...]:
        """The gradient, and factors by one label an example: to precondition with they serve as well as exact ones."""
        return LossGradient(), FisherKfac(examples=self.examples, estimator="sampled")

    def least(self, state: State) -> int:
        """The gradient in 8 bits, and the diagonals of the factors."""
        return super().least(state) + 4 * sum(sum(tensor.shape) for tensor in state.values())

    def most(self, state: State) -> float:
        """Factors are the better the finer they are."""
        return float("inf")


@dataclass(frozen=True)
class SecantStep(Step):
    """How far to go along each of the directions that are remembered."""

    def wanted(self, losses: Tensor, memory: State) -> bool:
        """Where there are directions, and they have not just been tried in vain."""
        return bool(_directions(memory)) and not _declined(losses)

    def needs(self) -> tuple[Statistic, ...]:
        """Slope and curvature along the directions."""
        return (Secants(examples=_EXAMPLES),)

    def question(self, state: State, memory: State) -> Question:
        """The model and the directions."""
        return Question(state, _directions(memory))

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """Minima of the quadratic, and points on the way to them."""
        directions, measured = _directions(memory), sums["secants"]
        minima = coefficients(measured["slope"], measured["curvature"], _TRUSTS)
        points = [(0.0,) * len(directions)]
        points += [tuple((length * c).tolist()) for c in minima for length in _LENGTHS]
        preferred = 1 + _TRUSTS.index(_LIKELY) * len(_LENGTHS) + _LENGTHS.index(1.0)
        return Proposal(directions, tuple(points), preferred), memory


def _directions(memory: State) -> tuple[dict[str, Tensor], ...]:
    numbers = sorted({key.partition("/")[0] for key in memory if key.startswith(_DIRECTION)})
    return tuple(prefixed(number, memory) for number in numbers)


def _declined(losses: Tensor) -> bool:
    return len(losses) > 1 and int(torch.argmin(losses)) == 0


def _in_order(direction: State, state: State) -> dict[str, Tensor]:
    return {name: direction[name] for name in state if name in direction}
