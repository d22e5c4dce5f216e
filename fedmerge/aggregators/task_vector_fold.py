"""What methods on task vectors share: what each client added to the base, and a step along what is made of all that."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Fold
from fedmerge.edits.delta import Delta, parts
from fedmerge.lookup.option_checks import check_range
from fedmerge.state import State, accumulator_dtype
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["CoordinateFold", "Sums", "TaskVector", "TaskVectorFold"]


class TaskVector(Delta):
    """``tau = theta_i - theta_0`` of one client, each tensor computed when it is looked at, in float32 or better.

    A client of negative weight is one of positive weight that went the opposite way.

    Parameters
    ----------
    update
        The client's model and its weight.
    base
        theta_0, with the same tensors.

    Examples
    --------
    >>> went = TaskVector(ClientUpdate(0, {"w": torch.tensor([3.0])}, -2.0), {"w": torch.tensor([1.0])})
    >>> went.weight, went["w"]
    (2.0, tensor([-2.]))
    """

    def __init__(self, update: ClientUpdate, base: State) -> None:
        super().__init__(update.state, base)
        self.weight, self.sign = abs(update.weight), math.copysign(1.0, update.weight)

    def __getitem__(self, name: str) -> Tensor:
        moved = super().__getitem__(name)
        return moved if self.sign > 0 else moved.neg_()

    def pieces(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Parts of one tensor in a row, with their places; whoever takes one may change it."""
        for part, piece in super().pieces(name):
            yield part, piece if self.sign > 0 else piece.neg_()

    @cached_property
    def squared_norms(self) -> Mapping[str, float]:
        """The squared Euclidean norm of every tensor, summed up in float64."""
        return {n: sum(float(p.double().square().sum()) for _, p in self.pieces(n)) for n in self}


@dataclass
class Sums:
    """Sums over clients, the same number for every tensor, each tensor in a row.

    Parameters
    ----------
    tensors
        By name, the sums and the shape that the tensor has.
    clients, weight, net, squares
        The number of clients, and over them the sums of how much they count, of that with the signs of their weights,
        and of its squares.
    majority
        Of which sign most coordinates are, for methods that ask for it.
    """

    tensors: dict[str, tuple[list[Tensor], torch.Size]] = field(default_factory=dict)
    clients: int = 0
    weight: float = 0.0
    net: float = 0.0
    squares: float = 0.0
    majority: float = 0.0

    @property
    def unit(self) -> float:
        """What makes the clients count one on average; 1 where nobody counts."""
        return self.clients / self.weight if self.weight else 1.0


@dataclass(frozen=True)
class TaskVectorFold(Fold[Sums]):
    """A method ``theta+ = theta_0 + scale * AGG(tau_1, ..., tau_K)`` that keeps a few sums over clients.

    Subclasses say how many sums of a model's size they keep, what a client's tensor adds to them (:meth:`take`) and
    what becomes of them (:meth:`combined`). A client of negative weight, which only :func:`fedmerge.merge` takes,
    enters with its task vector turned round.

    Parameters
    ----------
    scale
        Factor on the merged task vector: the server's learning rate. 0 stays at the base, below 0 goes the opposite
        way.
    """

    requires_base: ClassVar[bool] = True
    allows_negative_weights: ClassVar[bool] = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "scale", -1e9, 1e9)

    @property
    def kept(self) -> int:
        """How many sums."""
        return 1

    def vector(self, update: ClientUpdate, base: State) -> TaskVector:
        """What of a client's task vector is merged: all of it."""
        return TaskVector(update, base)

    def counts(self, vector: TaskVector) -> float:
        """How much a client counts: its weight."""
        return vector.weight

    @abstractmethod
    def take(self, sums: Sequence[Tensor], vector: TaskVector, name: str, weight: float) -> None:
        """Add one tensor of a client to the sums, which are tensors in a row [n]."""

    @abstractmethod
    def combined(self, sums: Sequence[Tensor], shape: torch.Size, total: Sums) -> Tensor:
        """The merged task vector of one tensor, in a row [n]; may reuse the memory of the sums."""

    def zero(self, context: MergeContext) -> Sums:
        """No client."""
        return Sums()

    def add(self, total: Sums, update: ClientUpdate, context: MergeContext) -> Sums:
        """One more client's task vector."""
        vector = self.vector(update, context.required_base(type(self).__name__))
        weight = self.counts(vector)
        for name in vector:
            self.take(self._sums(total, name, update.state[name]), vector, name, weight)
        total.clients += 1
        total.weight += weight
        total.net += vector.sign * weight
        total.squares += weight**2
        return total

    def join(self, total: Sums, other: Sums) -> Sums:
        """Unite the sums, tensor by tensor."""
        for name, (sums, shape) in other.tensors.items():
            if name in total.tensors:
                for part in parts(len(sums[0])):
                    self.unite([each[part] for each in total.tensors[name][0]], [each[part] for each in sums])
            else:
                total.tensors[name] = sums, shape
        total.clients += other.clients
        total.weight += other.weight
        total.net += other.net
        total.squares += other.squares
        return total

    def unite(self, mine: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Bring a piece of others' sums into the same of mine, in place."""
        for own, other in zip(mine, others, strict=True):
            own.add_(other)

    def finish(self, total: Sums, context: MergeContext, memory: State) -> tuple[State, State]:
        """Step from the base along what becomes of the sums, which are used up."""
        base, merged = context.required_base(type(self).__name__), {}
        for name in list(total.tensors):
            sums, shape = total.tensors.pop(name)
            moved = self.combined(sums, shape, total)
            merged[name] = moved.mul_(self.scale).add_(base[name].reshape(-1)).view(shape)
        return merged, {}

    def _sums(self, total: Sums, name: str, like: Tensor) -> list[Tensor]:
        if name not in total.tensors:
            kind = accumulator_dtype(like.dtype)
            sums = [torch.zeros(like.numel(), dtype=kind, device=like.device) for _ in range(self.kept)]
            total.tensors[name] = sums, like.shape
        return total.tensors[name][0]


class CoordinateFold(TaskVectorFold):
    """One that treats every coordinate by itself, so that it can do with a piece of a tensor at a time."""

    @abstractmethod
    def include(self, sums: Sequence[Tensor], piece: Tensor, weight: float) -> None:
        """Add one client's `piece` [n], which may be changed, to the same piece of the sums, in place."""

    @abstractmethod
    def combine(self, sums: Sequence[Tensor], total: Sums) -> Tensor:
        """The merged task vector of a piece, [n]; may reuse the memory of the sums."""

    def take(self, sums: Sequence[Tensor], vector: TaskVector, name: str, weight: float) -> None:
        """Add one tensor of a client, in pieces."""
        for part, piece in vector.pieces(name):
            self.include([each[part] for each in sums], piece, weight)

    def combined(self, sums: Sequence[Tensor], shape: torch.Size, total: Sums) -> Tensor:
        """The merged task vector of one tensor, made in pieces."""
        for part in parts(len(sums[0])):
            sums[0][part] = self.combine([each[part] for each in sums], total)
        return sums[0]
