"""The weights of many clients as one: every tensor of a model with a client axis in front, and their descent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge.training.correction import correct
from fedmerge.training.local_training import LocalTraining

__all__ = ["Members", "Stack", "call", "descend", "slots", "stacked_rates"]

# Some of the clients of a stack: a slice is a view of its tensors, numbers are a copy.
Members = slice | NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Stack:
    """The tensors of K clients.

    Parameters
    ----------
    weights
        Parameters that train, [K, *shape].
    buffers
        Buffers, [K, *shape].
    slots
        What the optimiser remembers, [K, *shape] for each weight: ``momentum``, or Adam's ``mean`` and ``square``.
    offsets
        What the method adds to the gradient of each weight, [K, *shape]; read only.
    origins
        Where each client started, [K, *shape], for weights of which each has its own; read only.
    """

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    slots: dict[str, dict[str, Tensor]]
    offsets: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, Tensor] = field(default_factory=dict)

    def part(self, members: Members) -> Stack:
        """The tensors of some clients."""

        def some(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor[members] for name, tensor in tensors.items()}

        kept = {kind: some(tensors) for kind, tensors in self.slots.items()}
        return Stack(some(self.weights), some(self.buffers), kept, some(self.offsets), some(self.origins))

    def put(self, members: Members, part: Stack) -> None:
        """Write a part back; nothing to do where it is a view."""
        if isinstance(members, slice):
            return
        for mine, other in ((self.weights, part.weights), (self.buffers, part.buffers)):
            for name, tensor in other.items():
                mine[name][members] = tensor
        for kind, kept in part.slots.items():
            for name, tensor in kept.items():
                self.slots[kind][name][members] = tensor


def call(model: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Output of `model` with other tensors in place of its own.

    A shared parameter goes by its first name. It is put into each module that has it, once: ``functional_call`` by
    itself puts it into a module once for each name, and then fails to take it out again.
    """
    first: dict[int, str] = {}
    swapped: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, own in (*module._parameters.items(), *module._buffers.items()):
            if own is not None:
                place = f"{path}.{name}" if path else name
                known = first.setdefault(id(own), place)
                if known in tensors:
                    swapped[place] = tensors[known]
    out: Tensor = functional_call(model, swapped, (x,), tie_weights=False)
    return out


def slots(settings: LocalTraining, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What the optimiser remembers before the first step."""
    kinds = ("mean", "square") if settings.optimizer != "sgd" else ("momentum",) if settings.momentum else ()
    return {kind: {name: torch.zeros_like(tensor) for name, tensor in weights.items()} for kind in kinds}


def descend(
    part: Stack,
    gradients: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    settings: LocalTraining,
    step: int,
    rate: float | Tensor | None = None,
) -> None:
    """One step of each client, in place: correction, clipping and optimiser, in the order of the serial path.

    Parameters
    ----------
    part
        The clients that take the step.
    gradients
        [k, *shape] of each weight that has one; overwritten.
    start
        The weights sent out, [*shape].
    step
        Steps taken before.
    rate
        Learning rate of this step, of all or [k] of each; that of the settings where not given.
    """
    rate, decay = settings.learning_rate if rate is None else rate, settings.decay
    if settings.proximal_mu or part.offsets:
        correct(gradients, part.weights, {**start, **part.origins}, settings.proximal_mu, part.offsets)
    if settings.clip_norm is not None:
        _clip(gradients, settings.clip_norm)
    for name, slope in gradients.items():
        # A complex number is a pair of real ones to an optimiser, as in torch.
        gradient, weight = _real(slope), _real(part.weights[name])
        if decay and settings.optimizer == "adamw":
            weight.mul_(1 - _like(rate, weight) * decay)
        elif decay:
            gradient.add_(weight, alpha=decay)
        kept = {kind: _real(tensors[name]) for kind, tensors in part.slots.items()}
        if settings.optimizer != "sgd":
            gradient = _adam(gradient, kept["mean"], kept["square"], settings, step + 1)
        elif settings.momentum:
            gradient = kept["momentum"].mul_(settings.momentum).add_(gradient)
        if isinstance(rate, Tensor):
            weight.sub_(gradient * _like(rate, weight))
        else:
            weight.sub_(gradient, alpha=rate)


def _like(rate: float | Tensor, weight: Tensor) -> float | Tensor:
    """A number for each client, in front of the axes of a weight."""
    return rate.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1)) if isinstance(rate, Tensor) else rate


def stacked_rates(settings: LocalTraining, steps: Sequence[int], device: torch.device) -> Tensor | None:
    """Learning rates [K, most] of each client's steps, in float64; None where they are all the same.

    Examples
    --------
    >>> stacked_rates(LocalTraining(learning_rate=1.0, step_schedule="warmup(length=2)"), [3, 1], torch.device("cpu"))
    tensor([[0.5000, 1.0000, 1.0000],
            [0.5000, 0.0000, 0.0000]], dtype=torch.float64)
    """
    if settings.step_schedule == "constant":
        return None
    rates = torch.zeros(len(steps), max(steps), dtype=torch.float64)
    for row, count in zip(rates, steps, strict=True):
        row[:count] = torch.tensor(settings.rates(count), dtype=torch.float64)
    return rates.to(device)


def _real(tensor: Tensor) -> Tensor:
    """A view of complex numbers as pairs."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _clip(gradients: Mapping[str, Tensor], largest: float) -> None:
    """Scale each client's gradient to the largest norm, as ``torch.nn.utils.clip_grad_norm_`` does for one."""
    norms = [torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1) for gradient in gradients.values()]
    factor = (largest / (torch.linalg.vector_norm(torch.stack(norms), dim=0) + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(factor.reshape(-1, *[1] * (gradient.ndim - 1)))


def _adam(gradient: Tensor, mean: Tensor, square: Tensor, settings: LocalTraining, count: int) -> Tensor:
    """Adam's step at a learning rate of one, with torch's constants (arXiv 1412.6980, algorithm 1)."""
    options, epsilon = settings.optimizer_options, float(settings.optimizer_options.get("eps", 1e-8))
    decay_mean, decay_square = map(float, options.get("betas", (0.9, 0.999)))
    mean.lerp_(gradient, 1 - decay_mean)
    square.mul_(decay_square).addcmul_(gradient, gradient, value=1 - decay_square)
    spread = (square / (1 - decay_square**count)).sqrt_().add_(epsilon)
    return (mean / spread).div_(1 - decay_mean**count)
