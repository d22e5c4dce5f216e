"""What robust methods share: they look at all clients at once, but at a piece of one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedmerge.state import State, accumulator_dtype
from fedmerge.update import ClientUpdate

__all__ = ["coordinate_wise", "counted", "squared_distances", "squared_norm", "stacked_pieces"]

_NUMBERS = 1 << 22  # of all clients together in one piece


def coordinate_wise(updates: Sequence[ClientUpdate], combine: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Apply `combine`, from [clients, n] to [n], to every coordinate, in float32 or better.

    Examples
    --------
    >>> sent = [ClientUpdate(i, {"w": torch.full((2,), float(i))}) for i in range(3)]
    >>> coordinate_wise(sent, lambda values: values.amax(0))["w"]
    tensor([2., 2.])
    """
    merged = {}
    for name, first in updates[0].state.items():
        pieces = [combine(piece) for piece in stacked_pieces(updates, name)]
        flat = torch.cat(pieces) if pieces else _flat(first)
        merged[name] = (torch.view_as_complex(flat.view(-1, 2)) if first.is_complex() else flat).reshape(first.shape)
    return merged


def squared_distances(updates: Sequence[ClientUpdate]) -> Tensor:
    """Squared Euclidean distances [clients, clients] between whole models, in float64.

    Differences are taken before they are squared: a hostile client's huge values, in a matrix product, would leave
    nothing of the small distances between the others.
    """
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in updates[0].state:
        for piece in stacked_pieces(updates, name):
            distances = torch.cdist(piece.double(), piece.double(), compute_mode="donot_use_mm_for_euclid_dist")
            total += distances.square().cpu()
    return total


def squared_norm(state: State, origin: State) -> float:
    """Squared Euclidean norm of ``state - origin``, in float64."""
    return sum(
        float(torch.linalg.vector_norm(_flat(tensor).double() - _flat(origin[name]).double())) ** 2
        for name, tensor in state.items()
    )


def counted(share: float, clients: int) -> int:
    """The most clients that are no more than `share` of them, whatever floating point makes of 0.29 * 100.

    Examples
    --------
    >>> counted(0.29, 100), counted(0.2, 4)
    (29, 0)
    """
    return int(share * clients + 1e-9)


def stacked_pieces(updates: Sequence[ClientUpdate], name: str, origin: State | None = None) -> Iterator[Tensor]:
    """A tensor of all clients, or how far it is from that of `origin`, in pieces [clients, n] of float32 or better."""
    rows = [_flat(update.state[name]) for update in updates]
    start = None if origin is None else _flat(origin[name])
    step = max(1, _NUMBERS // len(rows))
    for first in range(0, rows[0].numel(), step):
        piece = torch.stack([row[first : first + step] for row in rows])
        yield piece if start is None else piece.sub_(start[first : first + step])


def _flat(tensor: Tensor) -> Tensor:
    """As real numbers in a row, in the type to compute in."""
    numbers = tensor.to(accumulator_dtype(tensor.dtype))
    return (torch.view_as_real(numbers) if tensor.is_complex() else numbers).reshape(-1)
