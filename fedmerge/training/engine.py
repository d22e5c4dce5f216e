"""Which way to train a cohort: stacked or one client after the other, whichever was measured to be faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fedmerge.errors import CannotStack
from fedmerge.tasks import Task
from fedmerge.training.cohort import train_cohort
from fedmerge.training.cohort_batches import Participant, count_steps
from fedmerge.training.local_training import LocalTraining
from fedmerge.training.one_by_one import train_one_by_one
from fedmerge.training.stacked_loss import is_stackable

__all__ = ["EngineChoice", "choose_engine", "has_stacked_loss"]

# A trial is a few steps of a few clients: enough to see a factor, cheap beside a round.
_CLIENTS, _STEPS, _REPEATS = 8, 2, 2
# Who gains less trains one by one, so that noise in a measurement does not change who does what.
_CLEARLY = 0.9
# Gradients that differ by more than this share of their norm are not the same gradients.
_SAME = 1e-2

Measure = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class EngineChoice:
    """An engine, and why.

    Parameters
    ----------
    name
        ``"serial"`` or ``"stacked"``.
    reason
        In words.
    serial_seconds, stacked_seconds
        What the trial took; None where there was nothing to measure.
    """

    name: Literal["serial", "stacked"]
    reason: str
    serial_seconds: float | None = None
    stacked_seconds: float | None = None


def has_stacked_loss(task: Task | None, participants: Sequence[Participant]) -> bool:
    """Whether the task's loss can be trained with stacked weights, see :func:`is_stackable`.

    Examples
    --------
    >>> from fedmerge.tasks import Classification
    >>> has_stacked_loss(None, []), has_stacked_loss(Classification(class_weights=(1.0, 2.0)), [])
    (True, False)
    """
    return is_stackable(task)


def choose_engine(
    model: nn.Module,
    participants: Sequence[Participant],
    settings: LocalTraining,
    *,
    seed: int,
    round: int,
    measure: Measure | None = None,
    task: Task | None = None,
) -> EngineChoice:
    """Try both engines on a few clients, check that they agree, and take the faster.

    Parameters
    ----------
    model, participants, settings, seed, round, task
        As for `train_cohort`.
    measure
        Seconds that a call takes; by default CPU time, or the time on the clock for a GPU.

    Examples
    --------
    >>> clients = [Participant(i, torch.randn(6, 2), torch.zeros(6, dtype=torch.long)) for i in range(4)]
    >>> taken = iter([1.0, 2.0, 1.1, 2.1])
    >>> options = {"seed": 0, "round": 1, "measure": lambda call: next(taken)}
    >>> choose_engine(nn.Linear(2, 3), clients, LocalTraining(), **options).reason
    'stacked took 2.00 of the serial time, on 4 clients and 2 steps'
    """
    if settings.why_serial is not None:
        return EngineChoice("serial", settings.why_serial)
    device = next(model.parameters()).device
    measure = measure or (lambda call: _seconds(call, device))
    few = participants[:_CLIENTS]
    steps = min(_STEPS, max(count_steps(len(alone.data), settings) for alone in few))
    trial = replace(settings, epochs=None, steps=steps)

    def serial() -> object:
        return train_one_by_one(model, few, trial, seed=seed, round=round, task=task)

    def stacked() -> object:
        return train_cohort(model, few, trial, seed=seed, round=round, task=task)

    try:
        # Also the warm-up of both: a first call pays for what torch loads when it is first wanted.
        difference = _difference(model, few[:2], settings, seed, round, task)
        if difference > _SAME:
            return EngineChoice("serial", f"stacked gradients differ from serial ones by {difference:.1%}")
        times = [(measure(serial), measure(stacked)) for _ in range(_REPEATS)]
    except CannotStack as error:
        return EngineChoice("serial", error.reason)
    alone, many = (min(taken) for taken in zip(*times, strict=True))
    what = f"stacked took {many / max(alone, 1e-12):.2f} of the serial time, on {len(few)} clients and {steps} steps"
    return EngineChoice("stacked" if many < _CLEARLY * alone else "serial", what, alone, many)


def _difference(
    model: nn.Module,
    few: Sequence[Participant],
    settings: LocalTraining,
    seed: int,
    round: int,
    task: Task | None = None,
) -> float:
    """How far apart one step of plain SGD ends with either engine, relative to its length."""
    plain = replace(settings, optimizer="sgd", momentum=0.0, optimizer_options={}, step_schedule="constant")
    once = replace(plain.in_round(round), epochs=None, steps=1)
    stacked = train_cohort(model, few, once, seed=seed, round=round, task=task).states
    serial = train_one_by_one(model, few, once, seed=seed, round=round, task=task).states
    apart = moved = 0.0
    for name, p in model.named_parameters():
        if p.requires_grad:
            apart += _squares(stacked[name] - serial[name])
            moved += _squares(serial[name] - p.detach())
    return (apart / moved) ** 0.5 if moved else float(apart > 0)


def _squares(tensor: Tensor) -> float:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return float(real.double().square().sum())


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start
