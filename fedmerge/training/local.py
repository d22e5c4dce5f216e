"""Local training of one client, for any model: the serial path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fedmerge.data.client_data import examples_of
from fedmerge.data.example_sets import IGNORED, Examples
from fedmerge.errors import InvalidOption
from fedmerge.inputs import changed
from fedmerge.seeding import generator, integer_seed
from fedmerge.tasks import Task
from fedmerge.tasks.label_shapes import check_classes, class_axis_of
from fedmerge.tasks.task import as_batch
from fedmerge.training.correction import NO_CORRECTION, Correction, correct
from fedmerge.training.early_stop import BestPass, Progress
from fedmerge.training.local_training import LocalTraining
from fedmerge.training.model_on_data import batches, batches_to_measure, device_of, moved, outputs_of, training_mode
from fedmerge.training.own_training import RoundBatches, train_by_function
from fedmerge.training.report import TrainingReport

__all__ = ["CrossEntropy", "LocalTraining", "batches", "batches_to_measure", "moved", "train"]


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
    correction: Correction = NO_CORRECTION,
    held_out: Examples | None = None,
) -> TrainingReport:
    """Train `model` in place on one client's examples.

    Parameters
    ----------
    model
        The model sent out this round; its parameters on entry are theta_0 of the proximal term.
    x, y
        Inputs [n, ...] and labels [n] or [n, T]; those of -100 do not count. Or, without `y`, examples in any other
        form that :class:`~fedmerge.data.ClientData` takes.
    settings
        How to train; a schedule over rounds is taken at `round`.
    seed, client, round
        Name the random stream of batches and dropout: the same three give the same result anywhere.
    task
        Whose loss to minimise; cross-entropy where not given.
    correction
        What the method adds to every gradient.
    held_out
        Examples that early stopping judges by; without any, training goes on to the end.

    Raises
    ------
    InvalidOption
        There are no examples, or their labels are none of the model's classes; the optimiser or schedule cannot be
        used.
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
    device, settings = device_of(model), settings.in_round(round)
    model = settings.trained_as(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _seed_global(integer_seed(seed, "dropout", client, round), device)
        if settings.train_fn is not None:
            mine = RoundBatches(model, data, settings, correction, held_out, seed=seed, client=client, round=round)
            return train_by_function(model, settings, mine)
        best = None
        if settings.patience is not None and held_out is not None and len(held_out):
            best = BestPass(model, held_out, settings.patience, f"client {client}", task)
        draws = generator(seed, "batches", client, round)
        return _descend(model, data, settings, draws, f"client {client}", task, correction, best)


def _descend(
    model: nn.Module,
    data: Examples,
    settings: LocalTraining,
    draws: np.random.Generator,
    what: str,
    task: Task | None,
    correction: Correction,
    best: BestPass | None,
) -> TrainingReport:
    """Take all steps of a round."""
    device = next(model.parameters()).device
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters, pull = list(trained.values()), settings.proximal_mu + correction.pull
    start = {name: p.detach().clone() for name, p in trained.items()} if pull else {}
    optimizer = settings.make_optimizer(parameters)
    _set_velocity(optimizer, trained, correction)
    epochs, number = settings.length
    order = data.drawn(settings.examples_per_step, epochs=epochs, steps=number, generator=draws)
    rates, a_pass = settings.rates(settings.steps_of(len(data))), -(-len(data) // settings.examples_per_step)
    known = None if data.tensors is None else data.tensors[1]
    loss_of: Callable[[Tensor, Tensor], Tensor] | None = None if task is None else task.mean_loss
    steps, examples, total = 0, 0, torch.zeros((), dtype=torch.float64, device=device)
    training_mode(model, settings.frozen_mode)
    for batch in order:
        optimizer.zero_grad(set_to_none=True)
        mean = _MeanOfStep(task, settings.accumulate > 1)
        for inputs, labels in _parts(moved(batch, device), settings):
            with _precision(settings, device):
                outputs = outputs_of(model, inputs, what, task)
                if task is not None and (examples == 0 or known is None):
                    task.check(outputs, labels)
                if task is None and (loss_of is None or known is None):
                    seen = labels if known is None else known
                    loss_of = CrossEntropy.of(model, inputs, outputs, labels, seen, what)
                assert loss_of is not None
                loss = loss_of(outputs, labels)
            mean.backward(loss, outputs, labels)
            examples += len(labels)
        total += mean.of_step(parameters) * len(batch[1])
        if pull or correction.offset:
            gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
            correct(gradients, {n: p.detach() for n, p in trained.items()}, start, pull, correction.offset)
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = rates[min(steps, len(rates) - 1)]  # one's own batches may be more than were told
        optimizer.step()
        steps += 1
        if best is not None and steps % a_pass == 0 and best.over(Progress(steps, examples, float(total))):
            break
    done = Progress(steps, examples, float(total))
    if best is not None:
        if steps % a_pass:  # a last pass that is not whole
            best.over(done)
        done = best.restored()
    report = settings.report(done.steps, done.total / done.examples, rates)
    return report if correction.velocity is None else replace(report, velocity=_velocity(optimizer, trained))


def _set_velocity(optimizer: Optimizer, trained: Mapping[str, nn.Parameter], correction: Correction) -> None:
    """Have SGD begin with the momentum of a correction."""
    for name, velocity in (correction.velocity or {}).items():
        if name in trained:
            optimizer.state[trained[name]]["momentum_buffer"] = velocity.to(trained[name], copy=True)


def _velocity(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """SGD's momentum, where it has one."""
    buffers = {name: optimizer.state[p].get("momentum_buffer") for name, p in trained.items()}
    return {name: tensor for name, tensor in buffers.items() if tensor is not None}


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy over the labels that count: ``Classification(class_axis).mean_loss``, in fewer calls.

    Parameters
    ----------
    class_axis
        Which axis of the outputs holds the classes.
    ignoring
        Whether some labels are to be ignored.

    Examples
    --------
    >>> logits, labels = torch.zeros(2, 3, 5), torch.tensor([[0] * 5, [-100] * 5])
    >>> round(float(CrossEntropy(1, ignoring=True)(logits, labels)), 4)  # log 3
    1.0986
    """

    class_axis: int
    ignoring: bool

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, outputs: Any, y: Tensor, labels: Tensor, what: str) -> CrossEntropy:
        """The loss for this model and these labels.

        Parameters
        ----------
        model, x, outputs, y
            A batch and what the model makes of it.
        labels
            All labels.
        what
            Whose they are, in front of an error.

        Raises
        ------
        InvalidOption
            They do not belong together.
        """
        axis = class_axis_of(model, x, outputs, y, what)
        check_classes(labels, outputs.shape[axis], what)
        return cls(axis, bool((labels == IGNORED).any()))

    def rows(self, outputs: Tensor) -> Tensor:
        """Scores [labels, classes] of outputs."""
        return outputs if outputs.ndim == 2 else outputs.movedim(self.class_axis, -1).flatten(0, -2)

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch; 0 where no label counts, of which torch makes NaN."""
        logits, labels = self.rows(outputs), y.flatten()
        if self.ignoring and not bool((labels != IGNORED).any()):
            return logits.sum() * 0
        return F.cross_entropy(logits, labels)


def _parts(batch: tuple[Any, Tensor], settings: LocalTraining) -> Iterator[tuple[Any, Tensor]]:
    """The batches of one step."""
    inputs, labels = batch
    if settings.accumulate == 1:
        yield inputs, labels
        return
    for first in range(0, len(labels), settings.batch_size):
        part = partial(_some, rows=slice(first, first + settings.batch_size))
        yield changed(inputs, part), part(labels)


class _MeanOfStep:
    """The loss of one step, and its gradient: the mean over the labels of all batches that make the step.

    Of labels that do not count, or weigh little, one batch may hold more than another. So sums are added up, and
    divided once all batches are in.
    """

    def __init__(self, task: Task | None, in_parts: bool) -> None:
        self._task, self._in_parts = task, in_parts
        self._sum, self._weight = torch.zeros(()), torch.zeros(())

    def backward(self, loss: Tensor, outputs: Any, labels: Tensor) -> None:
        """Add a batch's mean loss, and its gradient to the parameters'."""
        if self._in_parts:
            task = self._task
            weight = (labels != IGNORED).sum() if task is None else task.weight(as_batch(outputs), labels)
            self._weight = weight + self._weight.to(weight.device)
            loss = loss * weight
        loss.backward()  # type: ignore[no-untyped-call]
        self._sum = loss.detach() + self._sum.to(loss.device) if self._in_parts else loss.detach()

    def of_step(self, parameters: Iterable[Tensor]) -> Tensor:
        """The mean loss; from here on the parameters' gradients are those of the mean."""
        if not self._in_parts:
            return self._sum
        weight = torch.where(self._weight > 0, self._weight, 1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(weight)
        return self._sum / weight


def _some(tensor: Tensor, rows: slice) -> Tensor:
    return tensor[rows]


def _precision(settings: LocalTraining, device: torch.device) -> AbstractContextManager[object]:
    if settings.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, settings.autocast))


def _seed_global(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from; ``torch.manual_seed`` also notes the call for each kind of device not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
