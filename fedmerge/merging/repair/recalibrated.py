"""Batch-norm statistics of a merged model, measured on the server's data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.inputs import OnDeviceOf, examples_in
from fedmerge.state import State
from fedmerge.statistics import BatchNormMoments

__all__ = ["has_batch_norm", "recalibrated"]


def has_batch_norm(state: State) -> bool:
    """Whether a state holds running statistics."""
    return any(name.rpartition(".")[2] == "running_var" for name in state)


def recalibrated(module: nn.Module, inputs: Iterable[Any]) -> dict[str, Tensor]:
    """Running statistics that a model has on these inputs; it is not modified.

    Averaging models shrinks the variance of what goes into a norm, so that their own statistics do not fit the
    merged model (Jordan et al. 2023, arXiv 2211.08403).

    Raises
    ------
    InvalidOption
        There are no inputs.

    Examples
    --------
    >>> norm = nn.BatchNorm1d(1)
    >>> recalibrated(norm, [torch.tensor([[1.0], [3.0]])])["running_mean"]
    tensor([2.])
    """
    sizes = ((x, examples_in(x)) for x in inputs)
    pairs = [(x, torch.zeros(size, dtype=torch.long)) for x, size in sizes if size > 1]
    if not pairs:
        raise InvalidOption("there are no batches of two inputs or more to measure batch norms on: pass data=")
    return dict(BatchNormMoments().measure(module, OnDeviceOf(module, pairs), None))
