"""Questions about a merged model that clients answer with sums: losses around it, and statistics at it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.errors import FedMergeError, InvalidOption
from fedmerge.models.resize import resize
from fedmerge.state import State, cast_like
from fedmerge.statistics import Batches, ComparingStatistic, Statistic
from fedmerge.statistics.compression import Compression, decode
from fedmerge.statistics.settings import compressed

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
        Tensors to add to it; each may be about some of the names.
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
        [points], cross-entropy summed over the examples that judge, float64.
    judged, examples
        How many examples judged, and how many were measured.
    statistics
        Means over the measured examples, by statistic.
    """

    losses: Tensor
    judged: int
    examples: int
    statistics: Mapping[str, State] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """[points], mean cross-entropy."""
        return self.losses / max(1, self.judged)


Ask = Callable[[Sequence[Question], Sequence[int]], Sequence[tuple[int, Sequence[Answer]]]]
"""Puts questions to these clients, in one exchange; each one's answers come with its number, in order of numbers."""


def bringing(ask: Ask, own: Mapping[int, State]) -> Ask:
    """`ask` with questions that compare bringing each client its own model as it was aligned."""

    def brought(questions: Sequence[Question], clients: Sequence[int]) -> Sequence[tuple[int, Sequence[Answer]]]:
        return ask([replace(question, own=own) if question.compares else question for question in questions], clients)

    return brought


def respond(question: Question, module: nn.Module, batches: Batches, own: nn.Module | None = None) -> Answer:
    """A client's answer; what is returned is what would be sent.

    Parameters
    ----------
    question
        What is asked.
    module
        Of the architecture, on the client's device; left as it is.
    batches
        ``(inputs, targets)`` of the client's examples.
    own
        The model that the client trained, in the order of neurons that the question has; needed where it compares.

    Raises
    ------
    InvalidOption
        The question compares, and there is no `own`.
    """
    pairs = list(batches)
    x, y = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    judges = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    judges[:: question.holdout] = True
    if len(x) < 2:
        judges[:] = False  # one example has to serve for measuring
    size = max((len(x) for x, _ in pairs), default=1)
    losses = torch.zeros(len(question.points), dtype=torch.float64)
    judging = _batches(x[judges], y[judges], size)
    for i in range(len(question.points)):
        losses[i] = _loss(resize(module, question.point(i)), judging)
    found: dict[str, State] = {}
    if question.needs:
        model = resize(module, question.point(question.at))
        measured = _batches(x[~judges], y[~judges], size)
        values = [(kind.name, _measured(kind, model, own, measured)) for kind in question.needs]
        sent, _ = compressed(values, dict(model.named_parameters()), question.compression, question.budget)
        found = {name: {n: t.cpu() for n, t in value.items()} for name, value in sent.items()}
    return Answer(losses, int(judges.sum()), int((~judges).sum()), found)


def _measured(kind: Statistic, model: nn.Module, own: nn.Module | None, batches: Batches) -> State:
    if not isinstance(kind, ComparingStatistic):
        return kind.measure(model, batches, None)
    if own is None:
        raise InvalidOption(f"statistic {kind.name!r} needs the client's own model, and it has kept none")
    return kind.compare(model, own, batches)


def _batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(x, size), torch.split(y, size), strict=True)) if len(x) else []


@torch.no_grad()
def _loss(model: nn.Module, batches: Batches) -> float:
    model.eval()
    total = 0.0
    for x, y in batches:
        total += float(F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="sum"))
    return total


def pooled(questions: Sequence[Question], answers: Sequence[tuple[int, Sequence[Answer]]]) -> list[Answer]:
    """For each question, the answers of all clients as one: sums of losses, means over all examples.

    A client with an answer that cannot be one is left out with a warning.

    Raises
    ------
    FedMergeError
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
        raise FedMergeError("no client answered a question about the merged model with anything that can be used")
    return [_sum([given[i] for given in good]) for i in range(len(questions))]


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
    return Answer(losses, sum(answer.judged for answer in answers), examples, statistics)


def _checked(question: Question, answer: Answer) -> Answer:
    if answer.losses.shape != (len(question.points),) or answer.examples < 0 or answer.judged < 0:
        raise InvalidOption(f"{list(answer.losses.shape)} losses of {len(question.points)} points")
    found = {}
    for kind in question.needs:
        if kind.name not in answer.statistics:
            raise InvalidOption(f"statistic {kind.name!r} is missing")
        found[kind.name] = kind.parse(decode(answer.statistics[kind.name]))
        kind.check(found[kind.name], question.base)
    # A point that has diverged is simply not chosen.
    losses = torch.where(answer.losses.isfinite(), answer.losses, torch.inf)
    return Answer(losses, answer.judged, answer.examples, found)
