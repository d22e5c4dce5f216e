"""Losses of several models that lie near each other: where only the head differs, features are computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.models.copies import copy_of
from fedmerge.tasks import Reading, Task, TaskAt, as_batch, reading_of

__all__ = ["summed_losses"]

Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def summed_losses(
    module: nn.Module,
    states: Sequence[Callable[[], nn.Module]],
    batches: Batches,
    changed: set[str],
    bound: float | None = None,
    task: Task | Reading | None = None,
) -> Tensor:
    """The task's loss of several models, summed over examples, [models] in float64.

    Parameters
    ----------
    module
        The model that the others differ from.
    states
        Makes each of the others, one after the other: it may be the same module every time, with other values.
    batches
        What they are judged on.
    changed
        Names of the parameters in which they differ from `module`.
    bound
        Most that one example may count, where its influence has to be bounded.
    task
        What they are to do; read from outputs and targets where not given.
    """
    tasks = reading_of(task).of(module, batches)
    head = _head(module, changed, batches)
    losses = torch.zeros(len(states), dtype=torch.float64)
    if head is None:
        for i, make in enumerate(states):
            model = make().eval()
            losses[i] = sum(_loss(tasks, x, model(x), y, bound) for x, y in batches)
        return losses
    heads = [copy_of(make().get_submodule(head)) for make in states]
    for x, y in batches:
        features = _seen(module, head, x)[0][0][0]
        for i, one in enumerate(heads):
            losses[i] += _loss(tasks, x, one(features), y, bound)
    return losses


def _loss(tasks: TaskAt, x: Tensor, outputs: Tensor, y: Tensor, bound: float | None) -> float:
    outputs = as_batch(outputs)
    found = tasks(x, outputs, y).losses(outputs, y)
    if bound is not None:
        found = found.nan_to_num(bound).clamp(-bound, bound)  # a loss of one's own may be negative
    return float(found.double().sum())


def _head(module: nn.Module, changed: set[str], batches: Batches) -> str | None:
    """Name of the linear layer that gives the outputs, if no other parameter differs."""
    for name, part in module.named_modules():
        own = {f"{name}.{key}" if name else key for key, _ in part.named_parameters(recurse=False)}
        if type(part) is nn.Linear and changed and changed <= own and (first := next(iter(batches), None)):
            seen, outputs = _seen(module, name, first[0])
            gives = len(seen) == 1 and seen[0][1].shape == outputs.shape and bool((seen[0][1] == outputs).all())
            return name if gives else None
    return None


def _seen(module: nn.Module, name: str, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What goes into a layer and comes out of it, call by call, and the model's outputs."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        seen.append((args[0] if args else named["input"], output))

    handle = module.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        outputs: Tensor = module(x)
    finally:
        handle.remove()
    return seen, outputs
