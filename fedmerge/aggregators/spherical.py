"""Means along great circles: what methods share that look at the angles between models, or between updates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator, Separable
from fedmerge.aggregators.pieces import stacked_pieces
from fedmerge.lookup.option_checks import check_word
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Spherical", "great_circle", "mean_direction"]


@dataclass(frozen=True)
class Spherical(Aggregator):
    """A mean ``sum_i a_i v_i`` whose factors follow from the lengths of the v_i and the angles between them.

    All of that is in the inner products of the clients, K x K numbers for each tensor: one pass over the clients'
    tensors takes them, a second adds up.

    Parameters
    ----------
    of
        v_i: ``"weights"`` are the models themselves, between which angles are small; ``"updates"`` are theta_i -
        theta_0, to which the base is added again.
    scope
        What is a vector: each ``"tensor"``, or the whole ``"model"``.
    """

    of: Literal["weights", "updates"] = "weights"
    scope: Literal["tensor", "model"] = "tensor"

    def __post_init__(self) -> None:
        check_word(self, "of", ("weights", "updates"))
        check_word(self, "scope", ("tensor", "model"))

    @property
    def separable(self) -> Separable:
        """One angle for the whole model needs the whole of it."""
        return "never" if self.scope == "model" else "tensor"

    @abstractmethod
    def factors(self, products: Tensor, shares: Tensor) -> Tensor:
        """a [K], of the inner products [K, K] and of ``p_i = w_i / sum_j w_j`` [K], all in float64."""

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Two passes over the clients, tensor by tensor."""
        updates = list(updates)
        origin = context.required_base(type(self).__name__) if self.of == "updates" else None
        shares = torch.tensor([update.weight for update in updates], dtype=torch.float64)
        shares /= shares.sum()
        names, common = list(updates[0].state), None
        if self.scope == "model":
            products = torch.stack([_inner_products(updates, name, origin) for name in names])
            common = self.factors(products.sum(0), shares)
        merged = {}
        for name in names:
            factors = common
            if factors is None:
                factors = self.factors(_inner_products(updates, name, origin), shares)
            merged[name] = _combined(updates, name, origin, factors)
        return merged, {}


def _inner_products(updates: Sequence[ClientUpdate], name: str, origin: State | None) -> Tensor:
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for piece in stacked_pieces(updates, name, origin):
        exact = piece.double()
        total += (exact @ exact.T).cpu()
    return total


def _combined(updates: Sequence[ClientUpdate], name: str, origin: State | None, factors: Tensor) -> Tensor:
    like = updates[0].state[name]
    pieces = [factors.to(piece) @ piece for piece in stacked_pieces(updates, name, origin)]
    flat = torch.cat(pieces) if pieces else like.new_zeros(0)
    merged = (torch.view_as_complex(flat.view(-1, 2)) if like.is_complex() else flat).view(like.shape)
    return merged if origin is None else merged.add_(origin[name])


def great_circle(products: Tensor, t: float) -> Tensor:
    """Factors [2] of the point at `t` on the arc from one vector to another, of their inner products [2, 2].

    ``sin((1 - t) w) / sin w`` and ``sin(t w) / sin w``, w the angle; ``1 - t`` and ``t`` where there is no arc: a
    vector is zero, or both are on one line.

    Examples
    --------
    >>> great_circle(torch.eye(2), 0.5)
    tensor([0.7071, 0.7071])
    """
    lengths = products.diagonal().sqrt()
    places = torch.tensor([1.0 - t, t], dtype=products.dtype)
    if not (lengths > 0).all():
        return places
    angle = torch.acos((products[0, 1] / lengths.prod()).clamp(-1, 1))
    return torch.sin(places * angle) / torch.sin(angle) if 1e-6 < angle < torch.pi - 1e-6 else places


def mean_direction(products: Tensor, shares: Tensor, *, steps: int, tolerance: float = 0.0) -> Tensor:
    """Factors [K] of the Karcher mean of directions, as long as the vectors are on average.

    From the direction m of ``sum_i p_i u_i``, u_i of length 1, repeat: take the u_i into the tangent space at m, go
    along the mean there, ``sum_i p_i log_m(u_i)``, on the sphere. Everything is in the span of the u_i, so that only
    factors of them are moved.

    Parameters
    ----------
    products
        Inner products [K, K].
    shares
        p_i [K]. A vector of length 0 has no direction, and counts in the mean length alone.
    steps, tolerance
        At most so many steps; stop before one that is shorter, in radians.

    Returns
    -------
    Tensor
        The factors; the shares themselves where the mean has no direction: all are zero, or some oppose it.

    Examples
    --------
    >>> mean_direction(torch.eye(2), torch.tensor([0.5, 0.5]), steps=10)
    tensor([0.7071, 0.7071])
    """
    lengths = products.diagonal().sqrt()
    moved = lengths > 0
    if not moved.any():
        return shares
    inverse = torch.where(moved, 1 / torch.where(moved, lengths, 1.0), 0.0)
    cosines = products * inverse[:, None] * inverse
    own = shares * moved
    own = own / own.sum()

    def length(factors: Tensor) -> Tensor:
        return (factors @ cosines @ factors).clamp(min=0).sqrt()

    if length(own) < 1e-9:
        return shares
    mean = own / length(own)
    for _ in range(steps):
        along = (cosines @ mean).clamp(-1, 1)
        if (along[moved] < -1 + 1e-12).any():
            return shares
        angles = torch.acos(along)
        pull = own * torch.where(angles > 1e-6, angles / torch.sin(angles), 1.0)
        step = pull - (pull @ along) * mean
        size = length(step)
        if size <= tolerance:
            break
        mean = torch.cos(size) * mean + torch.sin(size) * step / size
        mean = mean / length(mean)
    return (shares @ lengths) * mean * inverse
