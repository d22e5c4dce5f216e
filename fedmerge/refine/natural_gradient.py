"""Second-order steps of the whole merged model on the clients' summed loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.aggregators.base import check_range
from fedmerge.errors import InvalidOption
from fedmerge.refine.base import Proposal, Refinement, Step, Sums
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import FisherKfac, LossGradient, Statistic
from fedmerge.weights import WeightMatrix

__all__ = ["NaturalGradient", "natural_direction"]


@register("natural_gradient", paper="arXiv:1503.05671")
@dataclass(frozen=True)
class NaturalGradient(Refinement):
    """Natural-gradient steps: an optimiser's, not a merge's, at the merged model and from the clients' sums.

    At the merged model clients send the gradient g of their loss and Kronecker factors A, G; layer by layer
    ``D = -(G + d_G I)^-1 g (A + d_A I)^-1`` with factored Tikhonov damping (Martens and Grosse 2015, section 6.3),
    ``d_A d_G = damping * tr(A) tr(G) / sizes``, and diagonal Fishers where a layer has no factors. Damping and length
    are those with the least loss on examples that the clients held out; length zero is among them, for at a model
    that fits its training data already such a step can only do harm.

    Parameters
    ----------
    count
        How many steps, at least 1.
    dampings
        To choose from; each costs a model's bytes downwards.
    lengths
        To choose from, besides zero.
    examples
        At most so many of each client for the factors; the gradient takes all.
    """

    count: int = 1
    dampings: tuple[float, ...] = (0.1, 1.0, 10.0)
    lengths: tuple[float, ...] = (0.015625, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
    examples: int | None = 2000

    def __post_init__(self) -> None:
        check_range(self, "count", 1, float("inf"), open_high=True)
        for name in ("dampings", "lengths"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise InvalidOption(f"NaturalGradient: {name} must be positive numbers, got {getattr(self, name)}")

    def steps(self, state: State) -> tuple[Step, ...]:
        """As many as asked for."""
        return (NaturalStep(tuple(self.dampings), tuple(self.lengths), self.examples),) * self.count


@dataclass(frozen=True)
class NaturalStep(Step):
    """One step of the whole model."""

    dear: ClassVar[bool] = True

    dampings: tuple[float, ...]
    lengths: tuple[float, ...]
    examples: int | None

    def needs(self) -> tuple[Statistic, ...]:
        """The gradient and the factors, at the model as it is now: those of a merge are no preconditioner here."""
        return LossGradient(), FisherKfac(examples=self.examples)

    def least(self, state: State) -> int:
        """The gradient in 8 bits, and the diagonals of the factors."""
        return sum(tensor.numel() + 4 * sum(tensor.shape) for tensor in state.values())

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """Every length along the direction of every damping."""
        directions = tuple(
            natural_direction(state, sums["loss_gradient"], sums["fisher_kfac"], damping) for damping in self.dampings
        )
        points = [(0.0,) * len(directions)]
        for i in range(len(directions)):
            points += [tuple(length * (i == k) for k in range(len(directions))) for length in self.lengths]
        return Proposal(directions, tuple(points), None), {}


def natural_direction(state: State, gradient: State, fisher: State, damping: float) -> dict[str, Tensor]:
    """The damped natural-gradient direction, by parameter.

    Parameters
    ----------
    state
        The model.
    gradient
        Of the loss, by parameter.
    fisher
        As :class:`~fedmerge.statistics.FisherKfac` measures it.
    damping
        In units of the mean of each layer's diagonal.

    Examples
    --------
    >>> w, fisher = torch.zeros(1, 1), {"w.A": torch.tensor([[4.0]]), "w.G": torch.tensor([[1.0]])}
    >>> natural_direction({"w": w}, {"w": torch.tensor([[8.0]])}, fisher, 1e-12)["w"].round(decimals=3)
    tensor([[-2.]], dtype=torch.float64)
    """
    found: dict[str, Tensor] = {}
    for name, factor in fisher.items():
        parameter, _, part = name.rpartition(".")
        if part == "A":
            matrix = WeightMatrix.measured_by(parameter, factor, state)
            inner, outer = _grouped(factor), _grouped(fisher[f"{parameter}.G"])
            found |= matrix.scatter(_preconditioned(matrix.gather(gradient).double(), inner, outer, damping))
        elif part == "diag":
            ridge = damping * float(factor.mean())
            if ridge > 0:
                found[parameter] = -gradient[parameter].double() / (factor.double() + ridge)
    return found


def _preconditioned(gradient: Tensor, inner: Tensor, outer: Tensor, damping: float) -> Tensor:
    """``-(G + d_G I)^-1 g (A + d_A I)^-1`` of matrices [groups, o, d]."""
    a, g = (factor.diagonal(dim1=-2, dim2=-1).mean() for factor in (inner, outer))
    if float(a) <= 0 or float(g) <= 0:  # a layer that nothing reaches
        return torch.zeros_like(gradient)
    root = damping**0.5
    damped = [f + root * size * torch.eye(f.shape[-1], dtype=f.dtype) for f, size in ((outer, g), (inner, a))]
    left = torch.linalg.solve(damped[0], gradient)
    right: Tensor = torch.linalg.solve(damped[1], left.transpose(-1, -2))
    return -right.transpose(-1, -2)


def _grouped(factor: Tensor) -> Tensor:
    return factor.double() if factor.ndim == 3 else factor.double()[None]
