"""Questions about a merged model that clients answer with sums: losses around it, and statistics at it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption, NoAnswer
from fedmerge.inputs import OnDeviceOf
from fedmerge.judging import summed_losses
from fedmerge.models.resize import resize
from fedmerge.state import State, cast_like
from fedmerge.statistics import Batches, ComparingStatistic, Statistic
from fedmerge.statistics.compression import Compression, decode
from fedmerge.statistics.noise import NoisySums
from fedmerge.statistics.settings import compressed
from fedmerge.statistics.taps import stored_dtype
from fedmerge.tasks import Reading, Task, outputs_like, reading_of

__all__ = ["Answer", "Ask", "Question", "bringing", "pooled", "respond"]

log = logging.getLogger("fedmerge")


@dataclass(frozen=True)
class Question:
    """What clients are asked about a model.

    Parameters
    ----------
    base
        All tensors of a model.
    directions
        Tensors to add to it, each perhaps to some of the names: of these points are made, and along them statistics.
    points
        Models to be judged: for each, a factor per direction; none where nothing is.
    at
        At which of the points statistics are measured; None for the base.
    needs
        What to measure.
    holdout
        Every so many-th example judges points and is not measured, so that no step is judged by what it was made of.
    compression, budget
        How statistics are sent, see :class:`~fedmerge.statistics.StatisticsSettings`.
    noise
        What clients do to protect single examples; `needs` must be clipped to match, see
        :meth:`~fedmerge.statistics.NoisySums.applied`.
    own
        By client, the model that it trained, its neurons in the order of `base`: of clients whose neurons the server
        has moved, where statistics compare. Each needs only its own.
    """

    base: State
    directions: tuple[State, ...] = ()
    points: tuple[tuple[float, ...], ...] = ()
    at: int | None = None
    needs: tuple[Statistic, ...] = ()
    holdout: int = 10
    compression: Compression = "none"
    budget: float = 1.0
    noise: NoisySums | None = None
    own: Mapping[int, State] = field(default_factory=dict)

    @property
    def compares(self) -> bool:
        """Whether clients need the model that they trained themselves to answer."""
        return any(isinstance(kind, ComparingStatistic) for kind in self.needs)

    def point(self, number: int | None) -> dict[str, Tensor]:
        """The tensors of one of the points, or of the base."""
        found = dict(self.base)
        if number is None:
            return found
        for factor, direction in zip(self.points[number], self.directions, strict=True):
            for name, step in direction.items():
                if factor:
                    found[name] = found[name].double() + factor * step.double()
        return cast_like(found, self.base)


@dataclass(frozen=True)
class Answer:
    """What one client, or all of them together, found.

    Parameters
    ----------
    losses
        [points], the task's loss summed over the examples that judge, float64.
    judged, examples
        How many examples judged, and how many were measured.
    statistics
        Means over the measured examples, by statistic.
    clients
        How many clients' sums these are.
    noise
        The noise that was added: whoever drops the question's wish for it on the way to a client is found out.
    """

    losses: Tensor
    judged: int
    examples: int
    statistics: Mapping[str, State] = field(default_factory=dict)
    clients: int = 1
    noise: NoisySums | None = None

    @property
    def loss(self) -> Tensor:
        """[points], mean loss."""
        return self.losses / max(1, self.judged)


Ask = Callable[[Sequence[Question], Sequence[int]], Sequence[tuple[int, Sequence[Answer]]]]
"""Puts questions to these clients, in one exchange; each one's answers come with its number, in order of numbers."""


def bringing(ask: Ask, own: Mapping[int, State]) -> Ask:
    """`ask` with questions that compare bringing each client its own model as it was aligned."""

    def brought(questions: Sequence[Question], clients: Sequence[int]) -> Sequence[tuple[int, Sequence[Answer]]]:
        return ask([replace(question, own=own) if question.compares else question for question in questions], clients)

    return brought


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
    x, y = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    judges = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    judges[:: question.holdout] = True
    if len(x) < 2:
        judges[:] = False  # one example has to serve for measuring
    size = max((len(x) for x, _ in pairs), default=1)
    noise, base, reading = question.noise, resize(module, question.base).eval(), reading_of(task)
    if len(x) and (question.points or any(kind.of_labels for kind in question.needs)):
        # Of all examples at once: the few that judge might not tell.
        reading.of(base, [(x, y)])(x, outputs_like(base, x), y)
    losses = summed_losses(
        base,
        [partial(resize, module, question.point(i)) for i in range(len(question.points))],
        _batches(x[judges], y[judges], size),
        {name for direction in question.directions for name in direction},
        None if noise is None else noise.loss_clip,
        reading,
    )
    generator = generator or _unpredictable()
    if noise is not None:
        losses = noise.noisy_losses(losses, generator)
    found: dict[str, State] = {}
    if question.needs:
        model = resize(module, question.point(question.at))
        measured = _batches(x[~judges], y[~judges], size)
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


def _batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(x, size), torch.split(y, size), strict=True)) if len(x) else []


def pooled(questions: Sequence[Question], answers: Sequence[tuple[int, Sequence[Answer]]]) -> list[Answer]:
    """For each question, the answers of all clients as one: sums of losses, means over all examples.

    A client with an answer that cannot be one is left out with a warning.

    Raises
    ------
    NoAnswer
        No client's answers can be used.
    """
    good: list[list[Answer]] = []
    for client, given in answers:
        try:
            if len(given) != len(questions):
                raise InvalidOption(f"{len(given)} answers to {len(questions)} questions")
            good.append([_checked(question, answer) for question, answer in zip(questions, given, strict=True)])
        except InvalidOption as error:
            log.warning("client %d: its answer is left out: %s", client, error)
    if not good:
        raise NoAnswer("no client answered a question about the merged model with anything that can be used")
    totals = [_steadied(question, _sum([given[i] for given in good])) for i, question in enumerate(questions)]
    return [_placed(total, question.base) for total, question in zip(totals, questions, strict=True)]


def _placed(total: Answer, base: State) -> Answer:
    """Statistics on the device of the model that they are to improve; clients send them on the CPU."""
    device = next(iter(base.values())).device
    placed = {kind: {n: t.to(device) for n, t in value.items()} for kind, value in total.statistics.items()}
    return replace(total, statistics=placed)


def _steadied(question: Question, total: Answer) -> Answer:
    """Sums with noise as they can be used, going by what is known of the noise."""
    if question.noise is None:
        return total
    kinds = [question.noise.applied(kind) for kind in question.needs]
    statistics = question.noise.steadied(kinds, total.statistics, total.examples, total.clients)
    return replace(total, losses=question.noise.doubted(total.losses, total.clients), statistics=statistics)


def _sum(answers: Sequence[Answer]) -> Answer:
    examples = sum(answer.examples for answer in answers)
    statistics: dict[str, dict[str, Tensor]] = {}
    for answer in answers:
        for kind, value in answer.statistics.items():
            into = statistics.setdefault(kind, {})
            for name, tensor in value.items():
                part = tensor.double() * (answer.examples / max(1, examples))
                into[name] = into[name] + part if name in into else part
    losses = torch.stack([answer.losses for answer in answers]).sum(0)
    judged, clients = sum(answer.judged for answer in answers), sum(answer.clients for answer in answers)
    return Answer(losses, judged, examples, statistics, clients, answers[0].noise)


def _checked(question: Question, answer: Answer) -> Answer:
    if answer.losses.shape != (len(question.points),) or answer.examples < 0 or answer.judged < 0:
        raise InvalidOption(f"{list(answer.losses.shape)} losses of {len(question.points)} points")
    if answer.noise != question.noise:
        raise InvalidOption(f"noise {answer.noise} where {question.noise} was asked for")
    found = {}
    for kind in question.needs if question.noise is None else map(question.noise.applied, question.needs):
        if kind.name not in answer.statistics:
            raise InvalidOption(f"statistic {kind.name!r} is missing")
        found[kind.name] = _read(kind, answer.statistics[kind.name], question)
    # A point that has diverged is simply not chosen.
    losses = torch.where(answer.losses.isfinite(), answer.losses, torch.inf)
    return replace(answer, losses=losses, statistics=found)


def _read(kind: Statistic, sent: State, question: Question) -> State:
    try:
        value = kind.parse(decode(sent, lambda shapes: kind.check_shapes(shapes, question.base)))
        kind.check_answer(value, question.base, len(question.directions))
    # What a client sends may be any tensors.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidOption(f"statistic {kind.name!r} cannot be read ({error})") from error
    return value
