"""The gradient of a client's loss, as one sum over its examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.errors import InvalidOption
from fedmerge.models.copies import copy_of
from fedmerge.state import State
from fedmerge.statistics.base import Batches, LayerStatistic
from fedmerge.statistics.taps import stored_dtype
from fedmerge.training.report import TrainingReport

__all__ = ["LossGradient"]


@dataclass(frozen=True)
class LossGradient(LayerStatistic):
    """Mean gradient of the cross-entropy over examples, in evaluation mode, under the parameters' names.

    As many bytes as the parameters. Logits may be [B, C] or [B, T, C], labels [B] or [B, T].

    Parameters
    ----------
    layers, examples
        See :class:`~fedmerge.statistics.base.LayerStatistic`.

    Examples
    --------
    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> LossGradient().measure(model, [(torch.eye(2), torch.tensor([0, 1]))], None)["weight"]
    tensor([[-0.2500,  0.2500],
            [ 0.2500, -0.2500]])
    """

    name: ClassVar[str] = "loss_gradient"

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure in one forward and backward pass, on a copy."""
        copied = copy_of(model).eval()
        named = {name: p.requires_grad_() for name, p in copied.named_parameters() if self.selects(name)}
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
        count = 0
        with torch.enable_grad():
            for inputs, targets in self.limited(batches):
                logits = copied(inputs)
                loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
                found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                for name, gradient in zip(named, found, strict=True):
                    if gradient is not None:
                        total[name] += gradient
                count += targets.numel()
        return {name: (value / count).to(stored_dtype(model)) for name, value in total.items()}

    def nbytes(self, model: nn.Module, example: Tensor) -> int:
        """One number per parameter."""
        return stored_dtype(model).itemsize * sum(p.numel() for n, p in model.named_parameters() if self.selects(n))

    def check(self, value: State, state: State) -> None:
        """Finite, and of the parameters' shapes."""
        super().check(value, state)
        for name, tensor in value.items():
            if name not in state or tensor.shape != state[name].shape:
                raise InvalidOption(f"statistic {self.name!r}: {name!r} {list(tensor.shape)} is no parameter's shape")
