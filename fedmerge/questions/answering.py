"""How a client answers a question about a merged model.

Some of its examples judge models, and statistics are measured on the others. The models to be judged often differ in
their last layer only; then the layers before it run once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedmerge.data.batch_stream import BatchStream
from fedmerge.inputs import OnDeviceOf, joined, rows, split
from fedmerge.models.resize import copy_of, refill, resize
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
    """Answer a question with a client's examples; the result is what would be sent.

    Parameters
    ----------
    question
        What is asked.
    module
        A module of the model's architecture, on the client's device. It is not modified.
    batches
        The client's examples as batches ``(inputs, targets)``, on any device.
    generator
        Draws the noise, on the CPU. By default it is seeded by the operating system. Outside of tests it has to be:
        noise protects nothing if the server can draw it too.
    own
        The model that the client trained, with its neurons in the order of ``question.base``. Needed where the question
        compares the merged model with it.
    task
        The task whose loss judges models and that statistics are measured for. Read from outputs and targets where not
        given.

    Raises
    ------
    TaskError
        The task cannot be known, or the targets do not belong to it.
    InvalidOption
        Noise is asked for on a statistic that has none, or the question compares and there is no `own`.
    """
    examples = _divided(module, batches, question.holdout)
    x, y = examples.first
    reading = reading_of(task)
    module = called_as_told(module, reading.told, x)
    own = None if own is None else called_as_told(own, reading.told, x)
    noise, base = question.noise, resize(module, question.base).eval()
    if len(y) and (question.points or any(kind.of_labels for kind in question.needs)):
        # The task is read here, from all examples: the few that judge might not tell which it is.
        reading.of(base, examples.all)(x, outputs_like(base, x), y)
    moved = resize(module, question.base) if question.points else base
    losses = summed_losses(
        base,
        [partial(_filled, moved, question, number) for number in range(len(question.points))],
        examples.judging,
        {name for direction in question.directions for name in direction},
        None if noise is None else noise.loss_clip,
        reading,
    )
    # A point may be a model that has diverged. It gets a huge loss, and so it is not chosen.
    losses = losses.nan_to_num(nan=torch.inf).clamp(max=DIVERGED * examples.judges)
    generator = generator or _unpredictable()
    if noise is not None:
        losses = noise.noisy_losses(losses, generator)
    statistics: dict[str, State] = {}
    if question.needs:
        model = resize(module, question.point(question.at))
        bounded = [] if noise is None else [noise.applied(kind) for kind in question.needs]
        kinds = [kind.told(reading) for kind in bounded or question.needs]
        values = [(kind.name, kind.answer(model, examples.measured, own, question.directions)) for kind in kinds]
        if noise is not None:
            exact = [value for _, value in values]
            noisy = noise.noisy(bounded, exact, examples.measures, generator, stored_dtype(model))
            values = [(kind.name, value) for kind, value in zip(bounded, noisy, strict=True)]
        sent, _ = compressed(values, dict(model.named_parameters()), question.compression, question.budget)
        statistics = {name: {n: t.cpu() for n, t in value.items()} for name, value in sent.items()}
    return Answer(losses, examples.judges, examples.measures, statistics, noise=noise)


class _Divided(NamedTuple):
    """A client's examples: those that judge, those that statistics are measured on, and the numbers of both.

    ``first`` is a first batch, or all examples where they are in memory; ``all`` has every example.
    """

    first: tuple[Any, Tensor]
    all: Batches
    judging: Batches
    measured: Batches
    judges: int
    measures: int


def _divided(module: nn.Module, batches: Batches, holdout: int) -> _Divided:
    """Divide a client's examples; a stream is not read into memory for it."""
    if isinstance(batches, BatchStream):
        mask = _which_judge(batches.count, holdout)
        judges, measures = int(mask.sum()), int((~mask).sum())
        return _Divided(next(iter(batches)), batches, batches.only(mask), batches.only(~mask), judges, measures)
    pairs = list(OnDeviceOf(module, batches))
    x, y = joined([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    size = max((len(y) for _, y in pairs), default=1)
    mask = _which_judge(len(y), holdout).to(y.device)
    judging, measured = (_batches(rows(x, part), y[part], size) for part in (mask, ~mask))
    return _Divided((x, y), [(x, y)], judging, measured, int(mask.sum()), int((~mask).sum()))


def _which_judge(count: int, holdout: int) -> Tensor:
    """Which of `count` examples judge: every `holdout`-th, spread over all of them, since data are often sorted."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[: judging_examples(count, holdout) * holdout : max(1, holdout)] = True
    return mask


def _unpredictable() -> torch.Generator:
    """A generator seeded by the operating system."""
    generator = torch.Generator()
    generator.seed()
    return generator


def _batches(x: Any, y: Tensor, size: int) -> list[tuple[Any, Tensor]]:
    return list(split(x, y, size)) if len(y) else []


def _filled(module: nn.Module, question: Question, number: int) -> nn.Module:
    """`module` with the tensors of one of the question's points."""
    return refill(module, question.point(number))


@torch.no_grad()
def summed_losses(
    module: nn.Module,
    makers: Sequence[Callable[[], nn.Module]],
    batches: Batches,
    changed: set[str],
    bound: float | None = None,
    task: Task | Reading | None = None,
) -> Tensor:
    """The loss of several models under the task, summed over examples: [models], float64.

    Parameters
    ----------
    module
        The model that the others are variants of.
    makers
        For each variant, a function that makes it. They are called one after the other, and may all return the same
        module, each time with other values.
    batches
        The examples.
    changed
        Names of the parameters in which variants differ from `module`.
    bound
        The largest loss that one example counts with, where the influence of single examples has to be bounded.
    task
        The task; read from outputs and targets where not given.
    """
    tasks = reading_of(task).of(module, batches)
    head = _only_changed_layer(module, changed, batches)
    losses = torch.zeros(len(makers), dtype=torch.float64)
    if head is None:
        for i, make in enumerate(makers):
            model = make().eval()
            losses[i] = sum(_loss(tasks, x, model(x), y, bound) for x, y in batches)
        return losses
    # What goes into the last layer is the same for all variants.
    heads = [copy_of(make().get_submodule(head)) for make in makers]
    for x, y in batches:
        features = _layer_calls(module, head, x)[0][0][0]
        for i, layer in enumerate(heads):
            losses[i] += _loss(tasks, x, layer(features), y, bound)
    return losses


def _loss(tasks: TaskAt, x: Tensor, outputs: Tensor, y: Tensor, bound: float | None) -> float:
    outputs = as_batch(outputs)
    losses = tasks(x, outputs, y).losses(outputs, y)
    if bound is not None:
        losses = losses.nan_to_num(bound).clamp(-bound, bound)  # a user's own loss may be negative
    return float(losses.double().sum())


def _only_changed_layer(module: nn.Module, changed: set[str], batches: Batches) -> str | None:
    """The name of the linear layer whose output is the model's, if all changed parameters are in it; else None."""
    for name, part in module.named_modules():
        parameters = {f"{name}.{key}" if name else key for key, _ in part.named_parameters(recurse=False)}
        if type(part) is nn.Linear and changed and changed <= parameters and (first := next(iter(batches), None)):
            calls, outputs = _layer_calls(module, name, first[0])
            # A model may call the layer several times, or do something to its output: then it has to run as a whole.
            last = len(calls) == 1 and calls[0][1].shape == outputs.shape and bool((calls[0][1] == outputs).all())
            return name if last else None
    return None


def _layer_calls(module: nn.Module, name: str, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Input and output of each call of a layer in a forward pass, and the model's outputs."""
    calls: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        calls.append((args[0] if args else named["input"], output))

    handle = module.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        outputs: Tensor = module(x)
    finally:
        handle.remove()
    return calls, outputs
