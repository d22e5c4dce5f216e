"""Stacked training of linear layers with activations between them, its gradient written by hand: the fast engine.

Autograd spends more on a small model than the arithmetic does. Here a layer's forward pass is one batched product, and
its gradient and plain SGD's step are one more, ``W <- (1 - lr decay) W - lr D^T X`` for all clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmerge.training.cohort_batches import CohortBatches
from fedmerge.training.local_training import LocalTraining
from fedmerge.training.stack import Stack, descend

__all__ = ["ACTIVATIONS", "Layer", "backward", "product", "train_linear"]


@dataclass(frozen=True)
class Layer:
    """A linear layer and the activation on its output; names as in the model's ``named_parameters``."""

    weight: str
    bias: str | None
    activation: str | None = None


# Each function, and its derivative as a factor in terms of its own output.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (torch.relu_, lambda out: out > 0),
    "tanh": (torch.tanh_, lambda out: 1 - out * out),
    "sigmoid": (torch.sigmoid_, lambda out: out * (1 - out)),
}


def train_linear(
    layers: Sequence[Layer],
    stack: Stack,
    batches: CohortBatches,
    start: dict[str, Tensor],
    settings: LocalTraining,
    rates: Tensor | None = None,
) -> Tensor:
    """Train all clients of a stack in place; the sum [K] of each one's losses over the examples that it saw.

    Parameters
    ----------
    layers
        The model; weights that are missing in the stack are frozen.
    stack, batches
        What the clients start from, and their batches in the same order.
    start
        All weights sent out, the frozen too.
    settings
        How to train.
    rates
        Learning rates [K, steps], where they are not those of the settings.
    """
    device = next(iter(start.values())).device
    total = torch.zeros(len(batches.sizes), dtype=torch.float64, device=device)
    count = len(batches.sizes)
    frozen = {name: t.expand(count, *t.shape) for name, t in start.items() if name not in stack.weights}
    last = layers[-1].weight
    batches.check_classes(len(start[last]))
    plain = settings.optimizer == "sgd" and not settings.momentum and settings.clip_norm is None and rates is None
    decay = settings.decay
    for step in range(batches.steps):
        sizes = batches.sizes[:, step]
        working = slice(0, int((sizes > 0).sum()))
        part = stack.part(working)
        x, y, shares = batches.at(step, working)
        weights = {**part.weights, **{name: tensor[working] for name, tensor in frozen.items()}, **part.buffers}
        losses, products = backward(layers, weights, part.weights, x.flatten(2), y, shares)
        if plain:
            for name, left, right in products:
                _fold(part.weights[name], left, right, part.origins.get(name, start[name]), settings, decay)
                if name in part.offsets:
                    part.weights[name].sub_(part.offsets[name], alpha=settings.learning_rate)
        else:
            gradients = {name: product(left, right) for name, left, right in products}
            descend(part, gradients, start, settings, step, None if rates is None else rates[working, step])
        total[working] += losses * torch.from_numpy(sizes[working]).to(device)
    return total


def backward(
    layers: Sequence[Layer],
    weights: dict[str, Tensor],
    trainable: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    shares: Tensor | None,
) -> tuple[Tensor, Iterator[tuple[str, Tensor, Tensor | None]]]:
    """Losses [k] of clients with inputs [k, b, d], and their gradients as products ``left^T right``, last layer first.

    A gradient may be applied before the next is asked for. ``right`` is None for a bias, whose gradient sums ``left``.
    """
    inputs = [x]
    for layer in layers:
        weight = weights[layer.weight].mT
        if layer.bias is None:
            out = torch.bmm(inputs[-1], weight)
        else:
            out = torch.baddbmm(weights[layer.bias].unsqueeze(1), inputs[-1], weight)
        inputs.append(ACTIVATIONS[layer.activation][0](out) if layer.activation else out)
    # Ignored labels and rows that a client lacks have a share of zero, whatever stands there.
    labels = (y if shares is None else y.clamp(min=0)).unsqueeze(2)
    logits = inputs.pop()
    logs = F.log_softmax(logits, 2)
    picked = logs.gather(2, labels).squeeze(2)
    shares = None if shares is None else shares.to(logs.dtype)
    losses = -(picked.mean(1) if shares is None else (picked * shares).sum(1)).double()
    delta = logs.exp_().scatter_add_(2, labels, logs.new_full((1, 1, 1), -1.0).expand(labels.shape))
    delta = delta.div_(y.shape[1]) if shares is None else delta.mul_(shares.unsqueeze(2))
    if last := layers[-1].activation:
        delta = delta.mul_(ACTIVATIONS[last][1](logits))

    def products(delta: Tensor) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        lowest = min((i for i, layer in enumerate(layers) if {layer.weight, layer.bias} & trainable.keys()), default=0)
        for index in range(len(layers) - 1, lowest - 1, -1):
            layer, below = layers[index], inputs[index]
            following = torch.bmm(delta, weights[layer.weight]) if index > lowest else delta
            if layer.weight in trainable:
                yield layer.weight, delta, below
            if layer.bias in trainable and layer.bias is not None:
                yield layer.bias, delta, None
            activation = layers[index - 1].activation if index > lowest else None
            delta = following.mul_(ACTIVATIONS[activation][1](below)) if activation else following

    return losses, products(delta)


def product(left: Tensor, right: Tensor | None) -> Tensor:
    """A gradient that `backward` gives in two parts."""
    return left.sum(1) if right is None else torch.bmm(left.mT, right)


def _fold(
    weight: Tensor, left: Tensor, right: Tensor | None, start: Tensor, settings: LocalTraining, decay: float
) -> None:
    """Plain SGD with the gradient never made: ``W <- (1 - lr (decay + mu)) W + lr mu W_0 - lr left^T right``."""
    rate = settings.learning_rate
    keep = 1 - rate * (decay + settings.proximal_mu)
    if right is None:
        (weight if keep == 1 else weight.mul_(keep)).sub_(left.sum(1), alpha=rate)
    else:
        weight.baddbmm_(left.mT, right, beta=keep, alpha=-rate)
    if settings.proximal_mu:
        weight.add_(start, alpha=rate * settings.proximal_mu)
