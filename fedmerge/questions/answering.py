"""A client's answer to a question about a merged model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedmerge.data.batch_stream import BatchStream
from fedmerge.inputs import OnDeviceOf, joined, rows, split
from fedmerge.models.copies import copy_of
from fedmerge.models.resize import refill, resize
from fedmerge.questions.question import DIVERGED, Answer, Question, judging_examples
from fedmerge.state import State
from fedmerge.statistics import Batches
from fedmerge.statistics.measuring.taps import stored_dtype
from fedmerge.statistics.sending.settings import compressed
from fedmerge.tasks import Reading, Task, TaskAt, as_batch, called_as_told, outputs_like, reading_of

__all__ = ["respond", "summed_losses"]


def respond(
    question: Question,
    module: nn.Module,
    batches: Batches,
    generator: torch.Generator | None = None,
    own: nn.Module | None = None,
    task: Task | Reading | None = None,
) -> Answer:
    """A client's answer; what is returned is what would be sent.

    Parameters
    ----------
    question
        What is asked.
    module
        Of the architecture, on the client's device; left as it is.
    batches
        ``(inputs, targets)`` of the client's examples, on any device.
    generator
        Of noise, on the CPU. Freshly seeded by the operating system where not given, as it has to be in earnest: noise
        that the server can draw as well protects nothing.
    own
        The model that the client trained, in the order of neurons that the question has; needed where it compares.
    task
        What models are to do: by its loss they are judged and measured. Read from outputs and targets where not given.

    Raises
    ------
    TaskError
        The task cannot be known, or the targets are none of it.
    InvalidOption
        Noise is asked for on what has none, or the question compares and there is no `own`.
    """
    parts = _divided(module, batches, question.holdout)
    x, y = parts.shown
    reading = reading_of(task)
    module = called_as_told(module, reading.told, x)
    own = None if own is None else called_as_told(own, reading.told, x)
    noise, base = question.noise, resize(module, question.base).eval()
    if len(y) and (question.points or any(kind.of_labels for kind in question.needs)):
        # Of all examples at once: the few that judge might not tell.
        reading.of(base, parts.whole)(x, outputs_like(base, x), y)
    moved = resize(module, question.base) if question.points else base
    losses = summed_losses(
        base,
        [partial(_filled, moved, question, number) for number in range(len(question.points))],
        parts.judging,
        {name for direction in question.directions for name in direction},
        None if noise is None else noise.loss_clip,
        reading,
    )
    # A point that has diverged is simply not chosen.
    losses = losses.nan_to_num(nan=torch.inf).clamp(max=DIVERGED * parts.judges)
    generator = generator or _unpredictable()
    if noise is not None:
        losses = noise.noisy_losses(losses, generator)
    found: dict[str, State] = {}
    if question.needs:
        model = resize(module, question.point(question.at))
        bounded = [] if noise is None else [noise.applied(kind) for kind in question.needs]
        kinds = [kind.told(reading) for kind in bounded or question.needs]
        values = [(kind.name, kind.answer(model, parts.measured, own, question.directions)) for kind in kinds]
        if noise is not None:
            sums = [value for _, value in values]
            noisy = noise.noisy(bounded, sums, parts.measures, generator, stored_dtype(model))
            values = [(kind.name, value) for kind, value in zip(bounded, noisy, strict=True)]
        sent, _ = compressed(values, dict(model.named_parameters()), question.compression, question.budget)
        found = {name: {n: t.cpu() for n, t in value.items()} for name, value in sent.items()}
    return Answer(losses, parts.judges, parts.measures, found, noise=noise)


class _Parts(NamedTuple):
    """A client's examples, of which some judge and the others are measured."""

    shown: tuple[Any, Tensor]
    whole: Batches
    judging: Batches
    measured: Batches
    judges: int
    measures: int


def _divided(module: nn.Module, batches: Batches, holdout: int) -> _Parts:
    if isinstance(batches, BatchStream):
        mask = _judges(batches.count, holdout)
        judges, measures = int(mask.sum()), int((~mask).sum())
        return _Parts(next(iter(batches)), batches, batches.only(mask), batches.only(~mask), judges, measures)
    pairs = list(OnDeviceOf(module, batches))
    x, y = joined([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    size = max((len(y) for _, y in pairs), default=1)
    mask = _judges(len(y), holdout).to(y.device)
    judging, measured = (_batches(rows(x, part), y[part], size) for part in (mask, ~mask))
    return _Parts((x, y), [(x, y)], judging, measured, int(mask.sum()), int((~mask).sum()))


def _judges(count: int, holdout: int) -> Tensor:
    """Which of so many examples judge."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[: judging_examples(count, holdout) * holdout : holdout] = True
    return mask


def _unpredictable() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def _batches(x: Any, y: Tensor, size: int) -> list[tuple[Any, Tensor]]:
    return list(split(x, y, size)) if len(y) else []


def _filled(module: nn.Module, question: Question, number: int) -> nn.Module:
    return refill(module, question.point(number))


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
