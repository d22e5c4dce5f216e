"""Early stopping: a client sends the best model of its passes, by the loss on what it holds out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedmerge.data.example_sets import Examples
from fedmerge.tasks import Task
from fedmerge.training.judged import judge

__all__ = ["BestPass", "Progress"]


@dataclass(frozen=True)
class Progress:
    """Steps taken, examples seen, and the sum of their losses."""

    steps: int = 0
    examples: int = 0
    total: float = 0.0


@dataclass
class BestPass:
    """The best pass over a client's examples so far.

    Parameters
    ----------
    model
        What trains.
    held_out
        The client's held-out examples, one at least.
    patience
        Passes that need not be better than the best.
    what
        Whose they are, in front of an error.
    task
        Whose loss; classification where not given.

    Examples
    --------
    >>> from fedmerge.data.client_data import examples_of
    >>> model = nn.Linear(1, 2)
    >>> best = BestPass(model, examples_of(torch.ones(1, 1), torch.tensor([1])), patience=1)
    >>> best.over(Progress(steps=3)), best.over(Progress(steps=6))
    (False, True)
    >>> best.restored().steps
    3
    """

    model: nn.Module
    held_out: Examples
    patience: int
    what: str = ""
    task: Task | None = None
    _loss: float = math.inf
    _waited: int = 0
    _progress: Progress | None = None
    _state: dict[str, Tensor] = field(default_factory=dict)

    def over(self, progress: Progress) -> bool:
        """Judge the model after a pass; whether to stop."""
        modes = [(module, module.training) for module in self.model.modules()]  # frozen parts run as in use
        loss = judge(self.model, self.held_out, what=self.what, task=self.task).loss
        for module, mode in modes:
            module.training = mode
        if self._progress is None or loss < self._loss:
            self._loss, self._waited, self._progress = loss, 0, progress
            self._state = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        else:
            self._waited += 1
        return self._waited >= self.patience

    @torch.no_grad()
    def restored(self) -> Progress:
        """Put the best model back; what had been done by then."""
        for name, tensor in self._tensors().items():
            tensor.copy_(self._state[name])
        return self._progress or Progress()

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())
