"""Batches of examples that are not in memory, for whoever reads them several times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedmerge.data.example_sets import Examples
from fedmerge.inputs import changed, rows

__all__ = ["BatchStream"]


@dataclass(frozen=True, eq=False)
class BatchStream:
    """All examples in order, or some of them, read anew each time.

    Parameters
    ----------
    examples
        What is read.
    device
        Where batches go.
    chosen
        A mask [n] of the examples to give; all where not given.

    Examples
    --------
    >>> from fedmerge.data.client_data import examples_of
    >>> stream = BatchStream(examples_of([(torch.zeros(2), i) for i in range(3)]))
    >>> [y.tolist() for _, y in stream.only(torch.tensor([True, False, True]))], stream.count
    ([[0, 2]], 3)
    """

    examples: Examples
    device: torch.device | None = None
    chosen: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        start = 0
        for inputs, targets in self.examples.in_order():
            batch, stop = (inputs, targets), start + len(targets)
            if self.chosen is not None:
                mask = self.chosen[start:stop].to(targets.device)
                batch = rows(inputs, mask), targets[mask]
            start = stop
            if len(batch[1]):
                yield changed(batch[0], lambda tensor: tensor.to(self.device)), batch[1].to(self.device)

    @property
    def count(self) -> int:
        """The number of examples."""
        return len(self.examples) if self.chosen is None else int(self.chosen.sum())

    def only(self, chosen: Tensor) -> BatchStream:
        """Some of the examples, given by a mask [n] on the CPU."""
        return replace(self, chosen=chosen)
