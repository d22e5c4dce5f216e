"""The merged model's features moved linearly towards the clients' own, within the output layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_count, check_range
from fedmerge.refine.refinement import Proposal, Refinement, Step, Sums
from fedmerge.refine.ridge_head import head_of
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import Statistic, SurgerySums

__all__ = ["Surgery", "surgical_map"]

_POINTS = ((0.0,), (0.5,), (1.0,))


@register("surgery", paper="arXiv:2402.02705")
@dataclass(frozen=True)
class Surgery(Refinement):
    """Features of the merged model moved by a low-rank map towards those of the clients' own models.

    Yang et al. 2024 add ``U relu(D z)`` to the features z of a merged model, a map for each task that is trained on
    inputs of the task. Here the map is linear and one for all, and so it needs nothing but sums over clients and is
    folded into the output layer: ``z + W [z, 1]`` with W the minimum of ``sum ||f - z - W [z, 1]||^2 + l ||W||^2`` at a
    rank, f being the features of the client's own model on the same input, ``A (z + W [z, 1]) + b`` the new output. No
    labels are in it, but held-out examples judge it: all of the map, half of it, or none.

    Parameters
    ----------
    rank
        Of W, at least 1; the paper takes 16. None: no limit.
    ridge
        l, in units of the mean diagonal of the moments, above 0.
    examples
        At most so many of each client are measured; all where not given.
    """

    rank: int | None = 16
    ridge: float = 1e-3
    examples: int | None = None

    compares: ClassVar[bool] = True
    fits_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_count(self, "rank", 1)
        check_range(self, "ridge", 1e-12, float("inf"), open_high=True)

    def steps(self, state: State) -> tuple[Step, ...]:
        """One."""
        return (SurgeryStep(self.rank, self.ridge, self.examples),)


@dataclass(frozen=True)
class SurgeryStep(Step):
    """Fold the map into the head."""

    rank: int | None
    ridge: float
    examples: int | None

    def needs(self) -> tuple[Statistic, ...]:
        """Moments of features, and own features against them."""
        return (SurgerySums(examples=self.examples),)

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """The head behind the map: all of it, half of the way, or none."""
        measured = sums["surgery_sums"]
        if not measured:
            raise InvalidOption(
                "there is no head to fold a map of features into: the output layer is frozen (requires_grad=False), "
                "personal or not linear"
            )
        weight = next(iter(measured)).rpartition(".")[0]
        moments, products = measured[f"{weight}.S"], measured[f"{weight}.F"]
        matrix = head_of(state, measured, moments)
        head = matrix.gather(state).double()[0]
        step = head[:, : len(products)] @ surgical_map(moments, products, self.ridge, self.rank).to(head)
        return Proposal((matrix.scatter(step[None]),), _POINTS, len(_POINTS) - 1), {}


def surgical_map(moments: Tensor, products: Tensor, ridge: float, rank: int | None = None) -> Tensor:
    """The W, [features, d], of least ``mean ||f - z - W h||^2 + l ||W||^2`` with ``l = ridge tr(S) / d``.

    The full solution is ``W = (F - S_z) (S + l I)^-1``; the best of a rank has the first singular vectors of
    ``W (S + l I)^(1/2)`` (reduced-rank regression).

    Parameters
    ----------
    moments
        ``S = mean h h^T``, [d, d], h being z, or z and a 1.
    products
        ``F = mean f h^T``, [features, d].
    ridge
        In units of the mean of the diagonal.
    rank
        None: no limit.

    Examples
    --------
    >>> surgical_map(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.5]]), 1e-12, rank=1).round().int().tolist()
    [[1, 0], [0, 0]]
    """
    moments, products = moments.double(), products.double()
    size = len(moments)
    pull = (ridge * moments.trace() / size).clamp_min(1e-300)
    damped = moments + pull * torch.eye(size, dtype=moments.dtype, device=moments.device)
    away = products - moments[: len(products)]
    if rank is None or rank >= len(products):
        solved: Tensor = torch.linalg.solve(damped, away.T)
        return solved.T
    values, vectors = torch.linalg.eigh(damped)
    roots = values.clamp_min(pull).rsqrt()
    left, strengths, right = torch.linalg.svd((away @ vectors) * roots, full_matrices=False)
    best: Tensor = (left[:, :rank] * strengths[:rank]) @ right[:rank] * roots @ vectors.T
    return best
