"""What a client sent in another type of numbers than the model has: brought into the model's, or refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedmerge.errors import BadUpdate
from fedmerge.state import extent

__all__ = ["in_models_type"]

_AS_SENT = "Send tensors as the model has them."


def in_models_type(client: int, name: str, tensor: Any, want: Tensor) -> Tensor:
    """A tensor of a client in the type of the model's.

    Nothing is calculated in a type that a client has chosen: doubles in one place of a sum in float32 would overflow
    there, or change what all the others get.

    Raises
    ------
    BadUpdate
        It is no plain tensor, holds another kind of numbers, or numbers that the model's type cannot hold.

    Examples
    --------
    >>> in_models_type(0, "w", torch.tensor([0.5], dtype=torch.float64), torch.zeros(1)).dtype
    torch.float32
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise BadUpdate(client, f"tensor {name!r} is {_called(tensor)}, not a plain tensor", _AS_SENT)
    sent: Tensor = tensor.detach() if tensor.requires_grad else tensor
    if sent.dtype == want.dtype:
        return sent
    if _kind(sent) != _kind(want):
        raise BadUpdate(client, f"tensor {name!r} is {sent.dtype}, the model has {want.dtype}", _AS_SENT)
    cast = sent.to(want.dtype)
    if _kind(want) == "integer":
        lost = not torch.equal(cast.to(sent.dtype), sent)
    else:
        lost = extent(cast) == float("inf") and not bool(_as_float(sent).isinf().any())
    if lost:
        raise BadUpdate(
            client,
            f"tensor {name!r} has an entry of {_largest(sent):.3g}, which the model's {want.dtype} cannot hold",
            "Send tensors as the model has them; if its training diverged, lower the learning rate.",
        )
    return cast


def _as_float(tensor: Tensor) -> Tensor:
    """Types of eight bits know few operations."""
    return tensor if tensor.is_complex() or tensor.element_size() > 1 else tensor.float()


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if not tensor.is_complex() else extent(tensor)


def _called(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return "quantized" if value.is_quantized else "without data" if value.is_meta else str(value.layout)


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point():
        return "float"
    # torch cannot calculate with the wide unsigned ones, which NumPy has too.
    return str(tensor.dtype) if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else "integer"
