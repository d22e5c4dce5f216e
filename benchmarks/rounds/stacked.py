"""A floor: the weights of many clients stacked, trained in one call.

An MLP's gradient is written by hand, and the update is part of its product (``baddbmm_``); any other model goes
through ``torch.func``, which gains little for convolutions on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from benchmarks.rounds.task import Pause, Task

__all__ = ["run"]

_CHUNK = 10  # clients at a time: their weights and gradients stay in the cache
Stacked = dict[str, Tensor]
Step = Callable[[Stacked, Tensor, Tensor, Tensor], None]


def run(task: Task, pause: Pause) -> None:
    """Train `_CHUNK` clients at a time, and add each chunk to the sum."""
    model = task.model()
    plain = not task.workload.channels
    step = _mlp_step(model, task.workload.learning_rate) if plain else _step(model, task.workload.learning_rate)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pause(0, lambda: state, "")
    for round in range(1, task.rounds + 1):
        total, weight = {name: torch.zeros_like(tensor) for name, tensor in state.items()}, 0
        clients = task.sampled(round)
        for start in range(0, len(clients), _CHUNK):
            chunk = clients[start : start + _CHUNK]
            stack = {name: tensor.expand(len(chunk), *tensor.shape).clone() for name, tensor in state.items()}
            sizes: list[int] = []
            for x, y, share in _batches(task, chunk, round, sizes):
                step(stack, x, y, share)
            scale = torch.tensor(sizes, dtype=torch.float32, device=task.device)
            for name, tensor in stack.items():
                total[name].view(-1).addmv_(tensor.flatten(1).T, scale)
            weight += sum(sizes)
        state = {name: tensor / weight for name, tensor in total.items()}
        pause(round, lambda state=state: state, "by hand" if plain else "vmap")  # type: ignore[misc]


def _batches(task: Task, chunk: list[int], round: int, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs [C, B, ...], labels [C, B] and each example's share of its batch [C, B] of all clients' next batches.

    A client whose batch is smaller, or who is done, is filled up with examples of share 0, which change nothing.
    """
    held = [task.data_fn(client, task.workload.clients) for client in chunk]
    sizes += [len(data) for data in held]
    plans = [list(task.batches(len(d), client, round)) for d, client in zip(held, chunk, strict=True)]
    for number in range(max(map(len, plans))):
        rows = [plan[number] if number < len(plan) else plan[0][:0] for plan in plans]
        width = max(map(len, rows))
        if min(map(len, rows)) == width:
            picks = [torch.from_numpy(index) for index in rows]
            share = torch.full((len(chunk), width), 1 / width, device=task.device)
        else:
            picks = [F.pad(torch.from_numpy(index), (0, width - len(index))) for index in rows]
            share = torch.zeros(len(chunk), width)
            for k, index in enumerate(rows):
                share[k, : len(index)] = 1 / max(1, len(index))
            share = share.to(task.device)
        x = torch.stack([data.train_x[pick] for data, pick in zip(held, picks, strict=True)])
        y = torch.stack([data.train_y[pick] for data, pick in zip(held, picks, strict=True)])
        yield x, y, share


@torch.no_grad()
def _mlp_step(model: nn.Sequential, rate: float) -> Step:
    """One SGD step of stacked MLPs: linear layers with ReLU between them."""
    names = [name for name, layer in model.named_children() if isinstance(layer, nn.Linear)]

    @torch.no_grad()
    def step(stack: Stacked, x: Tensor, y: Tensor, share: Tensor) -> None:
        inputs = [x.flatten(2)]
        for name in names:
            bias, weight = stack[f"{name}.bias"], stack[f"{name}.weight"]
            out = torch.baddbmm(bias[:, None], inputs[-1], weight.transpose(1, 2))
            inputs.append(out if name == names[-1] else out.relu_())
        slope = inputs.pop().softmax(-1)
        slope.scatter_add_(2, y[..., None], torch.full_like(slope[..., :1], -1))
        slope *= share[..., None]
        for name in reversed(names):
            bias, weight, below = stack[f"{name}.bias"], stack[f"{name}.weight"], inputs.pop()
            lower = torch.bmm(slope, weight).mul_(below > 0) if inputs else slope
            weight.baddbmm_(slope.transpose(1, 2), below, alpha=-rate)
            bias.sub_(slope.sum(1), alpha=rate)
            slope = lower

    return step


def _step(model: nn.Sequential, rate: float) -> Step:
    """One SGD step of stacked models of any kind."""

    def loss(state: Stacked, x: Tensor, y: Tensor, share: Tensor) -> Tensor:
        logits = functional_call(model, state, (x,))
        return (F.cross_entropy(logits, y, reduction="none") * share).sum()

    slopes = vmap(grad(loss))

    def step(stack: Stacked, x: Tensor, y: Tensor, share: Tensor) -> None:
        for name, slope in slopes(stack, x, y, share).items():
            stack[name].sub_(slope, alpha=rate)

    return step
