"""Losses of several models that lie near each other: where only the head differs, features are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["summed_losses"]

Batches = Sequence[tuple[Tensor, Tensor]]


@torch.no_grad()
def summed_losses(
    module: nn.Module,
    states: Sequence[Callable[[], nn.Module]],
    batches: Batches,
    changed: set[str],
    bound: float | None = None,
) -> Tensor:
    """Cross-entropy of several models, summed over examples, [models] in float64.

    Parameters
    ----------
    module
        The model that the others differ from.
    states
        Makes each of the others.
    batches
        What they are judged on.
    changed
        Names of the parameters in which they differ from `module`.
    bound
        Most that one example may count, where its influence has to be bounded.
    """
    head = _head(module, changed, batches)
    losses = torch.zeros(len(states), dtype=torch.float64)
    if head is None:
        for i, make in enumerate(states):
            model = make().eval()
            losses[i] = sum(_loss(model(x), y, bound) for x, y in batches)
        return losses
    heads = [dict(make().named_modules())[head] for make in states]
    for x, y in batches:
        features = _inputs(module, head, x)[0]
        for i, one in enumerate(heads):
            losses[i] += _loss(one(features), y, bound)
    return losses


def _loss(logits: Tensor, y: Tensor, bound: float | None) -> float:
    found = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
    if bound is not None:
        found = found.view(len(y), -1).sum(1).nan_to_num(bound).clamp(max=bound)
    return float(found.double().sum())


def _head(module: nn.Module, changed: set[str], batches: Batches) -> str | None:
    """Name of the linear layer that gives the outputs, if no other parameter differs."""
    for name, part in module.named_modules():
        own = {f"{name}.{key}" if name else key for key, _ in part.named_parameters(recurse=False)}
        if type(part) is nn.Linear and changed and changed <= own and batches:
            _, given, outputs = _inputs(module, name, batches[0][0])
            return name if given.shape == outputs.shape and bool((given == outputs).all()) else None
    return None


def _inputs(module: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into a layer and comes out of it, and the model's outputs."""
    seen: list[tuple[Tensor, Tensor]] = []
    part = module.get_submodule(name)
    handle = part.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        outputs: Tensor = module(x)
    finally:
        handle.remove()
    (features, given), *_ = seen
    return features, given if len(seen) == 1 else torch.zeros(0), outputs
