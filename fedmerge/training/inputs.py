"""What a model has to say of its inputs before it sees them: the device, and the kinds of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import ModelError

__all__ = ["OnDeviceOf", "device_of", "told_of_types"]


def device_of(model: nn.Module) -> torch.device:
    """Where a model that is to be trained is.

    Raises
    ------
    ModelError
        It has no parameters.

    Examples
    --------
    >>> device_of(nn.Linear(1, 1))
    device(type='cpu')
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ModelError(f"{type(model).__name__} has no parameters: there is nothing to train")
    return parameter.device


@dataclass(frozen=True, eq=False)
class OnDeviceOf:
    """Batches on the device where a model's parameters are, moved one at a time; read as often as `batches` can be.

    A DataLoader gives tensors on the CPU, wherever the model is.

    Parameters
    ----------
    model
        Whose device; batches of a model without parameters stay where they are.
    batches
        Tensors, or tuples or lists of them; anything else in them is passed on as it is.

    Examples
    --------
    >>> [x.device.type for x, y in OnDeviceOf(nn.Linear(1, 1), [(torch.zeros(2, 1), torch.zeros(2))])]
    ['cpu']
    """

    model: nn.Module
    batches: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        parameter = next(self.model.parameters(), None)
        for batch in self.batches:
            yield batch if parameter is None else _moved(batch, parameter.device)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, tuple | list):
        return tuple(_moved(part, device) for part in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


@contextmanager
def told_of_types(model: nn.Module, x: Tensor, what: str = "") -> Iterator[None]:
    """Say what is wrong where a model fails on inputs of another type than its parameters.

    Examples
    --------
    >>> with told_of_types(nn.Linear(2, 1), torch.zeros(1, 2, dtype=torch.long), "client 3"):
    ...     raise RuntimeError("mat1 and mat2 must have the same dtype, but got Long and Float")
    Traceback (most recent call last):
    ...
    fedmerge.errors.ModelError: client 3: the model, whose parameters are torch.float32, cannot take inputs of torch.int64 (mat1 and mat2 must have the same dtype, but got Long and Float): convert them, x.to(torch.float32)
    """  # noqa: E501 - as the error is written
    try:
        yield
    except RuntimeError as error:
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()}
        reason = str(error).partition("\n")[0]
        # Embeddings say so where they get fractions for rows.
        lookup = x.is_floating_point() and "ndices" in reason
        if (x.dtype in kinds and not lookup) or not kinds or not ("dtype" in reason or "type" in reason):
            raise
        want = torch.int64 if lookup else sorted(kinds, key=str)[0]
        raise ModelError(
            f"{what + ': ' if what else ''}the model, whose parameters are {sorted(map(str, kinds))[0]}, cannot take "
            f"inputs of {x.dtype} ({reason}): convert them, x.to({want})"
        ) from error
