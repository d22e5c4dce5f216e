"""What every system is handed, so that all do the same arithmetic: clients, batches, initial model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.rounds.examples import ClientRows, load_examples
from benchmarks.rounds.workloads import Workload, build
from fedmerge.data import ClientData, Dataset
from fedmerge.models.resize import fill
from fedmerge.seeding import batch_indices, generator
from fedmerge.state import State
from fedmerge.training.judged import evaluate

__all__ = ["Pause", "System", "Task"]


@dataclass(frozen=True)
class Task:
    """A workload with everything that names its random draws.

    Parameters
    ----------
    workload
        What to simulate.
    rounds
        How many rounds.
    seed
        Root of partition, initial model, sampling and batches.
    data_dir
        Folder of the data sets.
    device
        ``"cpu"`` or ``"cuda"``; the data lie there too.
    workers
        Of fedmerge; more than one are Ray actors.
    """

    workload: Workload
    rounds: int
    seed: int = 0
    data_dir: Path | None = None
    device: str = "cpu"
    workers: int = 1

    @property
    def data(self) -> Dataset:
        """The data set."""
        return load_examples(self.workload.dataset, self.data_dir, self.device)

    @cached_property
    def data_fn(self) -> Callable[[int, int], ClientData]:
        """Gives a client its examples."""
        return ClientRows(self.workload, self.data_dir, self.seed, self.device)

    def model(self) -> nn.Sequential:
        """The initial model."""
        shape, classes = self.data.input_shape, self.data.num_classes
        return build(self.workload, shape, classes, self.seed).to(self.device)

    def sampled(self, round: int) -> list[int]:
        """Clients that train in a round, the same that our strategies draw; nothing walks over the known ones."""
        known, size = self.workload.clients, self.workload.sampled
        if size == known:
            return list(range(known))
        return sorted(generator(self.seed, "sampling", round).choice(known, size=size, replace=False).tolist())

    def batches(self, examples: int, client: int, round: int) -> Iterator[NDArray[np.int64]]:
        """Positions of a client's batches in a round, the same that our clients draw."""
        stream = generator(self.seed, "batches", client, round)
        return batch_indices(examples, self.workload.batch_size, epochs=1, generator=stream)

    def accuracy(self, state: State) -> float:
        """Share of the test set that a global model gets right."""
        model = self.model()
        fill(model, {name: torch.as_tensor(tensor) for name, tensor in state.items()})
        return evaluate(model, self.data.test_x, self.data.test_y)[1]


Pause = Callable[[int, Callable[[], State], str], None]
"""Called by a system when it is ready (round 0) and after each round.

It is handed the round, a way to get the global model, and how clients were trained.

It blocks until the next round may begin: what a system does between two calls is what is measured.
"""
System = Callable[[Task, Pause], None]
"""Runs all rounds of a task."""
