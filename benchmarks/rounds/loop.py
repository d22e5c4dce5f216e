"""The measure of all systems: FedAvg as one writes it in plain PyTorch, one client after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rounds.task import Pause, Task

__all__ = ["run"]


def run(task: Task, pause: Pause) -> None:
    """Train with Module, autograd and torch.optim.SGD; sum the models in place as they come."""
    workload, model = task.workload, task.model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pause(0, lambda: state, "")
    for round in range(1, task.rounds + 1):
        total, weight = {name: torch.zeros_like(tensor) for name, tensor in state.items()}, 0
        for client in task.sampled(round):
            data = task.data_fn(client, workload.clients)
            model.load_state_dict(state)
            optimizer = torch.optim.SGD(model.parameters(), lr=workload.learning_rate)
            for rows in task.batches(len(data), client, round):
                index = torch.from_numpy(rows)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(data.train_x[index]), data.train_y[index])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            _add(total, model.state_dict(), len(data))
            weight += len(data)
        state = {name: tensor / weight for name, tensor in total.items()}
        pause(round, lambda state=state: state, "autograd")  # type: ignore[misc]


def _add(total: dict[str, Tensor], state: dict[str, Tensor], weight: int) -> None:
    for name, tensor in state.items():
        total[name].add_(tensor, alpha=weight)
