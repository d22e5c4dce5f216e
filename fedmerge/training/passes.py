"""Passes over all of a client's examples, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fedmerge.data.batch_stream import BatchStream
from fedmerge.data.client_data import examples_of
from fedmerge.data.example_sets import Examples
from fedmerge.inputs import changed

__all__ = ["batches", "batches_to_measure", "moved"]


def moved(batch: tuple[Any, Tensor], device: torch.device | None) -> tuple[Any, Tensor]:
    """Inputs of any form, and targets, on a device."""
    inputs, targets = batch
    return changed(inputs, lambda tensor: tensor.to(device)), targets.to(device)


def batches(
    x: Any, y: Tensor | None = None, batch_size: int = 512, device: torch.device | None = None
) -> Iterator[tuple[Any, Tensor]]:
    """All examples in order, `batch_size` at a time, on `device`; `x` and `y` as for :func:`train`."""
    for batch in examples_of(x, y).in_order(batch_size):
        yield moved(batch, device)


def batches_to_measure(examples: Examples, device: torch.device | None = None) -> Iterable[tuple[Any, Tensor]]:
    """All examples in order, to be read as often as it takes: views of tensors, else read anew each time.

    Examples
    --------
    >>> from fedmerge.data.client_data import examples_of
    >>> found = batches_to_measure(examples_of([(torch.zeros(2), 0), (torch.ones(2), 1)]))
    >>> [len(y) for x, y in found], [len(y) for x, y in found]
    ([2], [2])
    """
    return list(batches(examples, device=device)) if examples.tensors is not None else BatchStream(examples, device)
