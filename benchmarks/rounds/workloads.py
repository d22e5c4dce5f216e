"""What is measured: a data set, how many clients share it, a model, and how a client trains."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from fedmerge.errors import InvalidOption, UnknownName
from fedmerge.seeding import integer_seed

__all__ = ["WORKLOADS", "Workload", "build", "find_workload"]


@dataclass(frozen=True)
class Workload:
    """One federation to simulate; every client trains one epoch of plain SGD a round.

    Parameters
    ----------
    name, dataset
        What it is called, and the data set.
    clients, sampled
        Clients that are known, and that train in a round.
    examples
        Of each client; at most so many under ``"dirichlet"``.
    division
        ``"dealt"`` gives each client rows of its own, ``"dirichlet"`` skews their labels (concentration 0.5),
        ``"drawn"`` draws a client's rows from its number alone, so that known clients cost nothing.
    channels, hidden
        Widths of 3x3 convolutions, each with 2x2 pooling, and of fully connected layers; ReLU between all.
    batch_size, learning_rate
        Of a client's SGD.
    rounds
        Rounds to measure unless told otherwise; the first is reported apart.
    """

    name: str
    dataset: str
    clients: int
    sampled: int
    examples: int
    division: Literal["dealt", "dirichlet", "drawn"]
    hidden: tuple[int, ...]
    batch_size: int
    learning_rate: float
    rounds: int
    channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.sampled <= self.clients:
            raise InvalidOption(f"workload {self.name}: {self.sampled} of {self.clients} clients cannot be sampled")


_MANY = Workload("W3", "mnist", 10_000, 200, 20, "drawn", (32,), 10, 0.1, 5)
WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("W1", "mnist", 1_000, 100, 60, "dealt", (100,), 20, 0.1, 10),
        Workload("W2", "fashion_mnist", 10, 10, 1_000, "dirichlet", (128,), 64, 0.05, 3, channels=(32, 64)),
        _MANY,
        Workload(**{**_MANY.__dict__, "name": "W3-million", "clients": 1_000_000}),
    )
}
"""The workloads by name."""


def find_workload(name: str) -> Workload:
    """The workload of that name.

    Raises
    ------
    UnknownName
        There is none.

    Examples
    --------
    >>> find_workload("W3-million").clients
    1000000
    """
    if name not in WORKLOADS:
        raise UnknownName("workload", name, WORKLOADS)
    return WORKLOADS[name]


def build(workload: Workload, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Sequential:
    """The initial model: the same bits in every process.

    Examples
    --------
    >>> [tuple(p.shape) for p in build(WORKLOADS["W3"], (1, 28, 28), 10, seed=0).parameters()]
    [(32, 784), (32,), (10, 32), (10,)]
    """
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(seed, "initialisation"))
        for below, above in pairwise((input_shape[0], *workload.channels)):
            layers += [nn.Conv2d(below, above, 3), nn.ReLU(), nn.MaxPool2d(2)]
        flat = nn.Sequential(*layers)(torch.zeros(1, *input_shape)).numel()
        layers.append(nn.Flatten())
        for below, above in pairwise((flat, *workload.hidden)):
            layers += [nn.Linear(below, above), nn.ReLU()]
        layers.append(nn.Linear((flat, *workload.hidden)[-1], classes))
    return nn.Sequential(*layers)
