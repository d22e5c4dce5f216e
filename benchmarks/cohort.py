"""Local training of many clients: stacked weights beside a plain PyTorch loop, in turn within one run.

    python benchmarks/cohort.py [--repeats 7] [--workload W1 ...]

Prints CPU milliseconds per client (median) and the ratio over the plain loop: one module, autograd and torch's SGD on
the same batches, which the loop is given and the others draw. One thread; synthetic images of MNIST's shape.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fedmerge.seeding import batch_indices, generator
from fedmerge.training import LocalTraining, Participant, choose_engine, cohort, train_cohort, train_one_by_one


@dataclass(frozen=True)
class Workload:
    clients: int
    examples: tuple[int, int]  # fewest and most of a client
    model: Callable[[], nn.Module]
    batch_size: int


def mlp(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def cnn() -> nn.Module:
    """Two convolutions of 32 and 64 maps, each followed by pooling, and a hidden layer of 128."""
    first, second = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
    head = (nn.Flatten(), nn.Linear(1600, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), *head)


WORKLOADS = {
    "W1": Workload(100, (60, 60), lambda: mlp(100), 20),
    "W1-ragged": Workload(100, (20, 100), lambda: mlp(100), 20),
    "W2": Workload(10, (96, 96), cnn, 32),
    "W3": Workload(200, (20, 20), lambda: mlp(32), 10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workload", nargs="*", choices=WORKLOADS, default=[*WORKLOADS])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.workload:
        _compare(name, WORKLOADS[name], arguments.repeats)


def _compare(name: str, work: Workload, repeats: int) -> None:
    rng = torch.Generator().manual_seed(0)
    low, high = work.examples
    sizes = torch.randint(low, high + 1, (work.clients,), generator=rng).tolist()
    people = [
        Participant(i, torch.randn(n, 1, 28, 28, generator=rng), torch.randint(10, (n,), generator=rng))
        for i, n in enumerate(sizes)
    ]
    settings = LocalTraining(learning_rate=0.1, momentum=0.0, epochs=1, batch_size=work.batch_size)
    torch.manual_seed(0)
    model = work.model()
    batches = [_batches(participant, settings) for participant in people]
    systems: dict[str, Callable[[], object]] = {
        "plain loop": lambda: _plain(model, people, batches, settings),
        "one by one": lambda: train_one_by_one(model, people, settings, seed=0, round=1),
        "stacked": lambda: train_cohort(model, people, settings, seed=0, round=1),
        "stacked, vmap": lambda: _by_vmap(model, people, settings),
    }
    times: dict[str, list[float]] = {system: [] for system in systems}
    for _ in range(repeats + 1):
        for system, call in systems.items():
            started = time.process_time()
            call()
            times[system].append(time.process_time() - started)
    for system, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[1:], times["plain loop"][1:], strict=True))
        print(f"{name:10s} {system:14s} {1e3 * statistics.median(seconds[1:]) / work.clients:8.3f} ms   {ratio:5.2f} x")
    choice = choose_engine(model, people, settings, seed=0, round=1)
    print(f"{name:10s} auto takes {choice.name}: {choice.reason}")


def _batches(participant: Participant, settings: LocalTraining) -> list[torch.Tensor]:
    draws = generator(0, "batches", participant.client, 1)
    order = batch_indices(len(participant.x), settings.batch_size, epochs=1, generator=draws)
    return [torch.from_numpy(rows) for rows in order]


def _plain(
    model: nn.Module, people: list[Participant], batches: list[list[torch.Tensor]], settings: LocalTraining
) -> list[list[torch.Tensor]]:
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    trained = []
    for participant, order in zip(people, batches, strict=True):
        optimiser = torch.optim.SGD(parameters, lr=settings.learning_rate)
        for rows in order:
            optimiser.zero_grad()
            F.cross_entropy(model(participant.x[rows]), participant.y[rows]).backward()
            optimiser.step()
        trained.append([p.detach().clone() for p in parameters])
        with torch.no_grad():
            torch._foreach_copy_(parameters, start)
    return trained


def _by_vmap(model: nn.Module, people: list[Participant], settings: LocalTraining) -> object:
    by_hand, cohort.linear_layers = cohort.linear_layers, lambda *_: None
    try:
        return train_cohort(model, people, settings, seed=0, round=1)
    finally:
        cohort.linear_layers = by_hand


if __name__ == "__main__":
    main()
