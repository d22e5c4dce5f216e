"""What is asked about a merged model, what clients answer, and what has to be so of an answer before it counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.state import State, cast_like
from fedmerge.statistics import ComparingStatistic, Statistic
from fedmerge.statistics.layer_statistic import Bounded
from fedmerge.statistics.sending.compression import Compression, bounded_bytes, check_forms, decode
from fedmerge.statistics.sending.noise import NoisySums

__all__ = ["DIVERGED", "Answer", "Ask", "Question", "bringing", "checked", "judging_examples"]


DIVERGED = 1e30
"""Mean loss of a model that has none, for its outputs are infinite or none at all."""


def judging_examples(examples: int, holdout: int) -> int:
    """How many of a client's examples judge.

    Examples
    --------
    >>> judging_examples(21, 10), judging_examples(1, 10)
    (3, 0)
    """
    return -(-examples // holdout) if examples > 1 else 0  # a single example has to serve for measuring


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


def checked(
    questions: Sequence[Question], given: Sequence[Answer], told: float | None = None, lowest: float = 0.0
) -> list[Answer]:
    """A client's answers in the form that sums are made of.

    Parameters
    ----------
    questions, given
        What was asked, and what came, which may be anything.
    told
        How many examples the client has told of in training, where that is known.
    lowest
        Least mean loss that there can be.

    Raises
    ------
    InvalidOption
        They cannot be answers of an honest client.
    """
    if not isinstance(given, Sequence) or len(given) != len(questions):
        raise InvalidOption(f"{len(given)} answers to {len(questions)} questions")
    for question, answer in zip(questions, given, strict=True):
        _check_counts(question, answer, told)
    counts = {(question.holdout, one.judged, one.examples) for question, one in zip(questions, given, strict=True)}
    if len(counts) > len({question.holdout for question in questions}):
        raise InvalidOption("numbers of examples that differ from one question of an exchange to the next")
    return [_checked(question, answer, lowest) for question, answer in zip(questions, given, strict=True)]


def _check_counts(question: Question, answer: Answer, told: float | None) -> None:
    judged, examples, clients = answer.judged, answer.examples, answer.clients
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (judged, examples, clients)):
        raise InvalidOption(f"{judged!r} and {examples!r} examples")
    total = judged + examples
    # Of several clients, whose sum this is, each rounds up.
    if clients < 1 or judged > judging_examples(total, question.holdout) + clients - 1:
        raise InvalidOption(f"{judged} of {total} examples judge, where one in {question.holdout} was asked to")
    if told is not None and total > told:
        raise InvalidOption(
            f"it answers for {total} examples and told of {told:g} in training: tell how many there are (num-examples)"
        )


def _checked(question: Question, answer: Answer, lowest: float) -> Answer:
    losses = answer.losses
    if losses.dtype != torch.float64 or losses.shape != (len(question.points),):
        raise InvalidOption(f"losses {list(losses.shape)} of {losses.dtype} for {len(question.points)} points")
    if bool(losses.isnan().any()):
        raise InvalidOption("losses that are NaN")
    if question.noise is None and bool((losses < lowest * answer.judged - 1e-9).any()):
        raise InvalidOption(
            f"a mean loss of {float(losses.min()) / max(1, answer.judged):.4g}, and none is below {lowest:g} "
            "(Trust.lowest_loss, for losses of your own)"
        )
    if answer.noise != question.noise:
        raise InvalidOption(f"noise {answer.noise} where {question.noise} was asked for")
    most = DIVERGED * answer.judged if question.noise is None else DIVERGED
    return replace(answer, losses=losses.clamp(-DIVERGED, most), statistics=_statistics(question, answer))


def _statistics(question: Question, answer: Answer) -> dict[str, State]:
    kinds = list(question.needs if question.noise is None else map(question.noise.applied, question.needs))
    names = {kind.name for kind in kinds}
    if set(answer.statistics) != names:
        more, less = sorted(set(answer.statistics) - names)[:5], sorted(names - set(answer.statistics))
        raise InvalidOption(f"statistics {more} that nobody asked for, {less} missing")
    # The sum of several clients' is in the form that sums have.
    if answer.clients == 1:
        _check_size(question, kinds, answer)
    found = {kind.name: _read(kind, answer.statistics[kind.name], question) for kind in kinds}
    if question.noise is not None and answer.clients == 1:
        question.noise.check([kind for kind in kinds if isinstance(kind, Bounded)], found, answer.examples)
    return found


def _check_size(question: Question, kinds: Sequence[Statistic], answer: Answer) -> None:
    floating = {tensor.dtype for tensor in question.base.values() if tensor.is_floating_point()}
    usual = {torch.promote_types(dtype, torch.float32) for dtype in floating} or {torch.float32}
    for kind in kinds:
        check_forms(answer.statistics[kind.name], question.compression, kind.dtypes or usual)
    if question.compression in ("auto", "int8"):
        allowed = question.budget * 4 * sum(tensor.numel() for tensor in question.base.values())
        sent = sum(bounded_bytes(answer.statistics[kind.name]) for kind in kinds)
        if sent > allowed:
            raise InvalidOption(f"statistics of {sent} bytes, where {int(allowed)} were allowed")


def _read(kind: Statistic, sent: State, question: Question) -> State:
    try:
        value = kind.parse(decode(sent, lambda shapes: kind.check_shapes(shapes, question.base)))
        kind.check_answer(value, question.base, len(question.directions))
    # What a client sends may be any tensors.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, InvalidOption) as error:
        raise InvalidOption(f"statistic {kind.name!r} cannot be read ({error})") from error
    return value
