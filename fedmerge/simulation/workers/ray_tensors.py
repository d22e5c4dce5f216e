"""Tensors in Ray's object store as arrays, which are read where they lie; torch's own way of pickling copies them."""

from __future__ import annotations

import warnings
from typing import Any

import ray
import torch
from torch import Tensor

__all__ = ["share_tensors", "stop_sharing"]


def share_tensors() -> None:
    """From now on, what this process puts or returns is read in place: nobody may write into what comes from there."""
    ray.util.register_serializer(Tensor, serializer=_to_array, deserializer=_from_array)


def stop_sharing() -> None:
    """As if :func:`share_tensors` had not been called."""
    ray.util.deregister_serializer(Tensor)


def _to_array(tensor: Tensor) -> Any:
    """A tensor as an array and its dtype; bfloat16, which NumPy lacks, as its 16 bits."""
    tensor = tensor.detach().cpu()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy(), tensor.dtype


def _from_array(given: Any) -> Tensor:
    array, dtype = given
    with warnings.catch_warnings():  # of memory that must not be written
        warnings.simplefilter("ignore")
        tensor = torch.from_numpy(array)
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor
