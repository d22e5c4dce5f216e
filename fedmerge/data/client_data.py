"""What one client holds: its training examples, and those it keeps to test on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.data.examples import checked_examples
from fedmerge.errors import DataError

__all__ = ["ClientData", "client_data"]


@dataclass(frozen=True, eq=False)
class ClientData:
    """The examples of one client; its length is the number of training examples.

    NumPy arrays become tensors, class numbers int64, labels `[n, 1]` become `[n]`.

    Parameters
    ----------
    train_x, train_y : Tensor
        Training examples `[n, ...]` and labels `[n]` or `[n, T]`. Labels of -100 do not count.
    held_out_x, held_out_y : Tensor
        Examples that the client never trains on; may be empty.

    Raises
    ------
    DataError
        Lengths differ, types are none that a model can take, or there are NaN or infinite values.

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

    def __post_init__(self) -> None:
        train_x, train_y = checked_examples(self.train_x, self.train_y, "training examples")
        held_out_x, held_out_y = checked_examples(self.held_out_x, self.held_out_y, "held-out examples")
        if not len(held_out_y) and not train_y.is_floating_point():
            held_out_y = held_out_y.to(torch.int64)
        for name, tensor in {
            "train_x": train_x, "train_y": train_y, "held_out_x": held_out_x, "held_out_y": held_out_y,
        }.items():  # fmt: skip
            object.__setattr__(self, name, tensor)

    def __len__(self) -> int:
        return len(self.train_x)


def client_data(data_fn: Callable[[int, int], ClientData], client: int, total: int) -> ClientData:
    """The examples of a client, from whoever has them.

    Raises
    ------
    DataError
        They cannot be used, or are none; the client is named.

    Examples
    --------
    >>> client_data(lambda client, total: torch.zeros(3), 1, 2)
    Traceback (most recent call last):
    ...
    fedmerge.errors.DataError: client 1: data_fn returned a Tensor: return fedmerge.data.ClientData(train_x, train_y, held_out_x, held_out_y), whose last two may be empty (train_x[:0], train_y[:0])
    """  # noqa: E501 - as the error is written
    try:
        found: object = data_fn(client, total)
    except DataError as error:
        raise DataError(f"client {client}: {error}") from error
    if not isinstance(found, ClientData):
        raise DataError(
            f"client {client}: data_fn returned a {type(found).__name__}: return fedmerge.data.ClientData(train_x, "
            "train_y, held_out_x, held_out_y), whose last two may be empty (train_x[:0], train_y[:0])"
        )
    return found
