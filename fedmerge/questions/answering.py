"""A client's answer to a question about a merged model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.inputs import OnDeviceOf, joined, rows, split
from fedmerge.judging import summed_losses
from fedmerge.models.resize import resize
from fedmerge.questions.question import Answer, Question
from fedmerge.state import State
from fedmerge.statistics import Batches
from fedmerge.statistics.settings import compressed
from fedmerge.statistics.taps import stored_dtype
from fedmerge.tasks import Reading, Task, called_as_told, outputs_like, reading_of

__all__ = ["DIVERGED", "judging", "respond"]

DIVERGED = 1e30
"""Mean loss of a model that has none, for its outputs are infinite or none at all."""


def judging(examples: int, holdout: int) -> int:
    """How many of a client's examples judge.

    Examples
    --------
    >>> judging(21, 10), judging(1, 10)
    (3, 0)
    """
    return -(-examples // holdout) if examples > 1 else 0  # a single example has to serve for measuring


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
    pairs = list(OnDeviceOf(module, batches))
    x, y = joined([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    judges = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    judges[: judging(len(y), question.holdout) * question.holdout : question.holdout] = True
    size = max((len(y) for _, y in pairs), default=1)
    reading = reading_of(task)
    module = called_as_told(module, reading.told, x)
    own = None if own is None else called_as_told(own, reading.told, x)
    noise, base = question.noise, resize(module, question.base).eval()
    if len(y) and (question.points or any(kind.of_labels for kind in question.needs)):
        # Of all examples at once: the few that judge might not tell.
        reading.of(base, [(x, y)])(x, outputs_like(base, x), y)
    losses = summed_losses(
        base,
        [partial(resize, module, question.point(i)) for i in range(len(question.points))],
        _batches(rows(x, judges), y[judges], size),
        {name for direction in question.directions for name in direction},
        None if noise is None else noise.loss_clip,
        reading,
    )
    # A point that has diverged is simply not chosen.
    losses = losses.nan_to_num(nan=torch.inf).clamp(max=DIVERGED * int(judges.sum()))
    generator = generator or _unpredictable()
    if noise is not None:
        losses = noise.noisy_losses(losses, generator)
    found: dict[str, State] = {}
    if question.needs:
        model = resize(module, question.point(question.at))
        measured = _batches(rows(x, ~judges), y[~judges], size)
        bounded = [] if noise is None else [noise.applied(kind) for kind in question.needs]
        kinds = [kind.told(reading) for kind in bounded or question.needs]
        values = [(kind.name, kind.answer(model, measured, own, question.directions)) for kind in kinds]
        if noise is not None:
            sums = [value for _, value in values]
            noisy = noise.noisy(bounded, sums, int((~judges).sum()), generator, stored_dtype(model))
            values = [(kind.name, value) for kind, value in zip(bounded, noisy, strict=True)]
        sent, _ = compressed(values, dict(model.named_parameters()), question.compression, question.budget)
        found = {name: {n: t.cpu() for n, t in value.items()} for name, value in sent.items()}
    return Answer(losses, int(judges.sum()), int((~judges).sum()), found, noise=noise)


def _unpredictable() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def _batches(x: Any, y: Tensor, size: int) -> list[tuple[Any, Tensor]]:
    return list(split(x, y, size)) if len(y) else []
