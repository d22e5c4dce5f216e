"""Local training of one client, for any model: the serial path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedmerge.data.client_data import examples_of
from fedmerge.data.example_sets import Examples
from fedmerge.errors import InvalidOption
from fedmerge.inputs import changed
from fedmerge.keywords_told import tell_keywords
from fedmerge.seeding import generator, integer_seed
from fedmerge.tasks import Task
from fedmerge.training.cross_entropy import CrossEntropy
from fedmerge.training.inputs import device_of, outputs_of
from fedmerge.training.report import TrainingReport
from fedmerge.training.usual_names import USUAL_NAMES

__all__ = ["LocalTraining", "batches", "batches_to_measure", "moved", "train"]


_USUAL_EPOCHS = 2


@tell_keywords(USUAL_NAMES)
@dataclass(frozen=True)
class LocalTraining:
    """How a client trains.

    Parameters
    ----------
    optimizer
        ``"sgd"`` or ``"adam"``; fresh in every round.
    learning_rate, momentum, weight_decay
        As in ``torch.optim``; momentum is SGD's.
    proximal_mu
        Weight of the proximal term ``mu / 2 ||theta - theta_0||^2`` (FedProx, arXiv 1812.06127).
    epochs, steps
        Passes over the client's examples, or a number of batches; two epochs where neither is given.
    batch_size
        Examples per batch.
    clip_norm
        Largest gradient norm; None does not clip.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        def demand(valid: bool, name: str, want: str) -> None:
            if not valid:
                raise InvalidOption(f"training.{name} must be {want}, got {getattr(self, name)!r}")

        for name in ("epochs", "steps", "batch_size"):
            value = getattr(self, name)
            demand(value is None or (isinstance(value, int) and not isinstance(value, bool)), name, "a whole number")
        for name in ("learning_rate", "momentum", "weight_decay", "proximal_mu", "clip_norm"):
            demand(not isinstance(getattr(self, name), bool), name, "a number")
        demand(self.batch_size is not None, "batch_size", "a whole number")
        demand(self.optimizer in ("sgd", "adam"), "optimizer", '"sgd" or "adam"')
        demand(0 < self.learning_rate < math.inf, "learning_rate", "positive")
        demand(0 <= self.momentum < 1, "momentum", "in [0, 1)")
        demand(0 <= self.weight_decay < math.inf, "weight_decay", "zero or more")
        demand(0 <= self.proximal_mu < math.inf, "proximal_mu", "zero or more")
        demand(self.epochs is None or self.epochs >= 1, "epochs", "at least 1")
        demand(self.steps is None or self.steps >= 1, "steps", "at least 1")
        demand(self.epochs is None or self.steps is None, "steps", "left out where epochs are given")
        demand(self.batch_size >= 1, "batch_size", "at least 1")
        demand(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "positive, or left out")

    @property
    def length(self) -> tuple[int | None, int | None]:
        """Epochs and steps, exactly one of them a number."""
        return (None, self.steps) if self.steps is not None else (self.epochs or _USUAL_EPOCHS, None)

    def report(self, steps: int, loss: float) -> TrainingReport:
        """The report of a client that took so many steps at this mean loss."""
        # Adam's steps are no linear recursion in the gradients, so its constants do not describe them.
        linear = self.optimizer == "sgd"
        return TrainingReport(
            steps=steps,
            loss=loss,
            learning_rate=self.learning_rate,
            momentum=self.momentum if linear else 0.0,
            proximal_mu=self.proximal_mu if linear else 0.0,
        )

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimiser."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )


def train(
    model: nn.Module,
    x: Any,
    y: Tensor | None,
    settings: LocalTraining,
    *,
    seed: int,
    client: int,
    round: int,
    task: Task | None = None,
) -> TrainingReport:
    """Train `model` in place on one client's examples.

    Parameters
    ----------
    model
        The model sent out this round; its parameters on entry are theta_0 of the proximal term.
    x, y
        Inputs [n, ...] and labels [n] or [n, T]; those of -100 do not count. Or, without `y`, examples in any other
        form that :class:`~fedmerge.data.ClientData` takes.
    seed, client, round
        Name the random stream of batches and dropout: the same three give the same result anywhere.
    task
        Whose loss to minimise; cross-entropy where not given.

    Raises
    ------
    InvalidOption
        There are no examples, or their labels are none of the model's classes.
    DataError
        The examples cannot be used, see :class:`~fedmerge.data.ClientData`.
    ModelError
        The model has no parameters, or cannot take such inputs.

    Examples
    --------
    >>> model = nn.Linear(2, 2)
    >>> x, y = torch.randn(10, 2), torch.zeros(10, dtype=torch.long)
    >>> train(model, x, y, LocalTraining(epochs=1, batch_size=4), seed=0, client=0, round=1).steps
    3
    """
    data = examples_of(x, y, f"client {client}")
    if len(data) == 0:
        raise InvalidOption(f"client {client} has no examples to train on")
    device = device_of(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters] if settings.proximal_mu else []
    optimizer = settings.make_optimizer(parameters)
    epochs, number = settings.length
    draws = generator(seed, "batches", client, round)
    order = data.drawn(settings.batch_size, epochs=epochs, steps=number, generator=draws)
    known = None if data.tensors is None else data.tensors[1]
    loss_of: Callable[[Tensor, Tensor], Tensor] | None = None if task is None else task.mean_loss
    steps, examples, total = 0, 0, torch.zeros((), dtype=torch.float64, device=device)
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _seed_global(integer_seed(seed, "dropout", client, round), device)
        for batch in order:
            optimizer.zero_grad(set_to_none=True)
            inputs, labels = moved(batch, device)
            outputs = outputs_of(model, inputs, f"client {client}")
            if task is not None and (steps == 0 or known is None):
                task.check(outputs, labels)
            if task is None and (loss_of is None or known is None):
                seen = labels if known is None else known
                loss_of = CrossEntropy.of(model, inputs, outputs, labels, seen, f"client {client}")
            assert loss_of is not None
            loss = loss_of(outputs, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            for parameter, origin in zip(parameters, start, strict=False):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - origin, alpha=settings.proximal_mu)
            if settings.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            total += loss.detach() * len(labels)
            steps, examples = steps + 1, examples + len(labels)
    return settings.report(steps, float(total) / examples)


def _seed_global(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from; ``torch.manual_seed`` also notes the call for each kind of device not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def moved(batch: tuple[Any, Tensor], device: torch.device | None) -> tuple[Any, Tensor]:
    """Inputs of any form, and targets, on a device."""
    inputs, targets = batch
    return changed(inputs, lambda tensor: tensor.to(device)), targets.to(device)


def batches(
    x: Any, y: Tensor | None = None, batch_size: int = 512, device: torch.device | None = None
) -> Iterator[tuple[Any, Tensor]]:
    """All examples in order, `batch_size` at a time, on `device`; `x` and `y` as for :func:`train`."""
    for batch in examples_of(x, y).in_order(batch_size):
        yield moved(batch, device)


def batches_to_measure(examples: Examples, device: torch.device | None = None) -> Iterable[tuple[Any, Tensor]]:
    """All examples in order, to be read as often as it takes: views of tensors, else read anew each time.

    Examples
    --------
    >>> from fedmerge.data.client_data import examples_of
    >>> found = batches_to_measure(examples_of([(torch.zeros(2), 0), (torch.ones(2), 1)]))
    >>> [len(y) for x, y in found], [len(y) for x, y in found]
    ([2], [2])
    """
    return list(batches(examples, device=device)) if examples.tensors is not None else _Rereadable(examples, device)


@dataclass(frozen=True, eq=False)
class _Rereadable:
    examples: Examples
    device: torch.device | None

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return batches(self.examples, device=self.device)
