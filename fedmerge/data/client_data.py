"""What one client holds: its training examples, and those it keeps to test on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ClientData"]


@dataclass(frozen=True, eq=False)
class ClientData:
    """The examples of one client; its length is the number of training examples.

    Parameters
    ----------
    train_x, train_y : Tensor
        Training examples `[n, ...]` and labels `[n]` or `[n, T]`.
    held_out_x, held_out_y : Tensor
        Examples that the client never trains on; may be empty.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)
    >>> len(ClientData(x[:4], y[:4], x[4:], y[4:]))
    4
    """

    train_x: Tensor
    train_y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor

    def __len__(self) -> int:
        return len(self.train_x)
