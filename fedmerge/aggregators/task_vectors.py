"""Task vectors: what each client changed of the model that all started from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.edits.delta import parts
from fedmerge.state import State, accumulator_dtype
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["TaskVectors", "is_matrix"]


@dataclass(frozen=True)
class TaskVectors:
    """``tau_i = theta_i - theta_0`` of all clients, made one tensor, or a part of it, at a time.

    Parameters
    ----------
    updates
        The clients' updates, at least one.
    base
        theta_0.
    shares
        ``p_i = n_i / sum_j n_j``.

    Examples
    --------
    >>> sent = [ClientUpdate(0, {"w": torch.ones(1)}, 3.0), ClientUpdate(1, {"w": torch.zeros(1)}, 1.0)]
    >>> TaskVectors.of(sent, MergeContext(base={"w": torch.zeros(1)}), "consensus").mean("w")
    tensor([0.7500])
    """

    updates: tuple[ClientUpdate, ...]
    base: State
    shares: tuple[float, ...]

    @classmethod
    def of(cls, updates: Iterable[ClientUpdate], context: MergeContext, method: str) -> TaskVectors:
        """The task vectors of these updates.

        Raises
        ------
        InvalidOption
            The context has no base; `method` is named in the message.
        """
        base, updates = context.required_base(method), tuple(updates)
        total = sum(update.weight for update in updates)
        return cls(updates, base, tuple(update.weight / total for update in updates))

    def __len__(self) -> int:
        return len(self.updates)

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return list(self.updates[0].state)

    def each(self, name: str, part: slice | None = None) -> Iterator[Tensor]:
        """A tensor of every client's task vector, in float32 or better; see :meth:`of_client`."""
        for client in range(len(self)):
            yield self.of_client(client, name, part)

    def of_client(self, client: int, name: str, part: slice | None = None) -> Tensor:
        """A tensor of one client's task vector, or a part of its entries in a row; `client` is its place here."""
        tensor, start = self.updates[client].state[name], self.base[name]
        if part is not None:
            tensor, start = tensor.reshape(-1)[part], start.reshape(-1)[part]
        return tensor.to(accumulator_dtype(tensor.dtype)) - start

    def mean(self, name: str, part: slice | None = None) -> Tensor:
        """``sum_i p_i tau_i`` of a tensor, or of a part of its entries in a row.

        Where only one client moved an entry, the result is exactly its product ``p_i tau_i``, rounded once.
        """
        total = torch.zeros_like(self.of_client(0, name, part))
        for share, vector in zip(self.shares, self.each(name, part), strict=True):
            total += share * vector
        return total

    def by_parts(self, name: str, combine: Callable[[slice], Tensor]) -> Tensor:
        """A tensor put together from what `combine` makes of parts of its entries in a row.

        What a formula needs in between then takes no memory of a model's size.
        """
        base = self.base[name]
        made = [combine(part) for part in parts(base.numel())]
        return torch.cat(made).view(base.shape) if made else torch.zeros_like(self.of_client(0, name))


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor is taken as a matrix [out, rest]: kernels of convolutions are, vectors and empty ones are not.

    Examples
    --------
    >>> is_matrix(torch.zeros(4, 3, 5, 5)), is_matrix(torch.zeros(4))
    (True, False)
    """
    return tensor.ndim >= 2 and tensor.numel() > 0
