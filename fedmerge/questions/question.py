"""Questions to clients about a merged model: what is asked, what an answer holds, and which answers are refused."""

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
"""The mean loss of a model whose outputs are infinite or NaN: a large number, so that sums of losses stay finite."""


def judging_examples(examples: int, holdout: int) -> int:
    """How many of a client's examples judge models; statistics are measured on the others.

    Examples
    --------
    >>> judging_examples(21, 10), judging_examples(1, 10), judging_examples(21, 1), judging_examples(21, 0)
    (3, 0, 21, 0)
    """
    if not holdout:
        return 0
    return -(-examples // holdout) if examples > 1 or holdout == 1 else 0  # a single one is needed for measuring


@dataclass(frozen=True)
class Question:
    """A question to clients about a merged model: how large its loss is, and what a statistic of it is.

    Clients compute losses at *points*. A point is a model: the base, plus a sum of directions with one factor each. So
    dozens of models can be judged while only the base and a few directions travel.

    Parameters
    ----------
    base
        All tensors of the merged model.
    directions
        Tensors that may be added to the base, by parameter. A direction need not cover all parameters. Some statistics,
        such as slopes, are measured along the directions.
    points
        For each model to be judged, one factor per direction. Empty where no model is to be judged.
    at
        The number of the point at which statistics are measured; None for the base.
    needs
        The statistics to measure.
    holdout
        Every `holdout`-th example judges models and is not measured. So no step is judged by the examples that it was
        computed from. Where it is 1 all examples judge, where it is 0 none.
    compression, budget
        How statistics are sent, see :class:`~fedmerge.statistics.StatisticsSettings`.
    noise
        The noise that clients add to protect single examples. Statistics in `needs` must be clipped to match, see
        :meth:`~fedmerge.statistics.NoisySums.applied`.
    own
        By client, the model that it trained, with its neurons in the order of `base`. Filled in for statistics that
        compare the merged model with the client's, and only for clients whose neurons the server has re-ordered. Each
        client gets its own model alone.
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
        """Whether clients need the models that they trained themselves in order to answer."""
        return any(isinstance(kind, ComparingStatistic) for kind in self.needs)

    def point(self, number: int | None) -> dict[str, Tensor]:
        """The tensors of one of the points; those of the base for None."""
        tensors = dict(self.base)
        if number is None:
            return tensors
        for factor, direction in zip(self.points[number], self.directions, strict=True):
            for name, step in direction.items():
                if factor:
                    # In float64: a short step would be lost to rounding beside a large parameter.
                    tensors[name] = tensors[name].double() + factor * step.double()
        return cast_like(tensors, self.base)


@dataclass(frozen=True)
class Answer:
    """The answer of one client, or the sum of several clients' answers.

    Parameters
    ----------
    losses
        For each point, the task's loss summed over the examples that judge: [points], float64.
    judged, examples
        The number of examples that judged, and the number that were measured.
    statistics
        By statistic, means over the measured examples.
    clients
        The number of clients whose answers are in this one.
    noise
        The noise that was added. It has to be the noise that was asked for, so that a message whose wish for noise was
        removed on its way is noticed.
    """

    losses: Tensor
    judged: int
    examples: int
    statistics: Mapping[str, State] = field(default_factory=dict)
    clients: int = 1
    noise: NoisySums | None = None

    @property
    def loss(self) -> Tensor:
        """For each point, the mean loss: [points]."""
        return self.losses / max(1, self.judged)


Ask = Callable[[Sequence[Question], Sequence[int]], Sequence[tuple[int, Sequence[Answer]]]]
"""``ask(questions, clients)`` sends questions to clients in one exchange. It returns, in order of client numbers, each
client's number with its answers, one per question."""


def bringing(ask: Ask, own: Mapping[int, State]) -> Ask:
    """An `ask` that adds to comparing questions the models in `own`: by client, its model as the server re-ordered it.

    Other questions are passed on as they are.
    """

    def ask_with_models(
        questions: Sequence[Question], clients: Sequence[int]
    ) -> Sequence[tuple[int, Sequence[Answer]]]:
        return ask([replace(question, own=own) if question.compares else question for question in questions], clients)

    return ask_with_models


def checked(
    questions: Sequence[Question], answers: Sequence[Answer], claimed: float | None = None, lowest: float = 0.0
) -> list[Answer]:
    """One client's answers, once they are known to be possible; their statistics are decoded.

    A client may send anything. What passes here has the right shapes, real and finite numbers, no more examples than
    the client trained on, no more bytes than were allowed, and the noise that was asked for. Whether it is true is
    another matter, see :class:`~fedmerge.questions.Trust`.

    Parameters
    ----------
    questions, answers
        What was asked, and what the client sent.
    claimed
        How many examples the client said in training that it has; None where that is not known.
    lowest
        The least mean loss that is possible under the task.

    Raises
    ------
    InvalidOption
        No honest client can have sent these answers.
    """
    if not isinstance(answers, Sequence) or len(answers) != len(questions):
        raise InvalidOption(f"{len(answers)} answers to {len(questions)} questions")
    pairs = list(zip(questions, answers, strict=True))
    for question, answer in pairs:
        _check_counts(question, answer, claimed)
    # A client has the same examples for all questions of an exchange.
    counts = {(question.holdout, answer.judged, answer.examples) for question, answer in pairs}
    if len(counts) > len({question.holdout for question in questions}):
        raise InvalidOption("numbers of examples that differ from one question of an exchange to the next")
    return [_decoded(question, answer, lowest) for question, answer in pairs]


def _check_counts(question: Question, answer: Answer, claimed: float | None) -> None:
    judged, examples, clients = answer.judged, answer.examples, answer.clients
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (judged, examples, clients)):
        raise InvalidOption(f"{judged!r} and {examples!r} examples")
    total = judged + examples
    # Each client rounds its number of judging examples up. In a sum of several clients that adds one for each.
    if clients < 1 or judged > judging_examples(total, question.holdout) + clients - 1:
        raise InvalidOption(f"{judged} of {total} examples judge, where one in {question.holdout} was asked to")
    if claimed is not None and total > claimed:
        raise InvalidOption(
            f"it answers for {total} examples and told of {claimed:g} in training: tell how many there are "
            "(num-examples)"
        )


def _decoded(question: Question, answer: Answer, lowest: float) -> Answer:
    """The answer with decoded statistics and bounded losses."""
    losses = answer.losses
    if losses.dtype != torch.float64 or losses.shape != (len(question.points),):
        raise InvalidOption(f"losses {list(losses.shape)} of {losses.dtype} for {len(question.points)} points")
    if bool(losses.isnan().any()):
        raise InvalidOption("losses that are NaN")
    # Noise may bring a small loss below the least one.
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
    # A sum of several clients' statistics, as masks make it, is not compressed.
    if answer.clients == 1:
        _check_size(question, kinds, answer)
    values = {kind.name: _read(kind, answer.statistics[kind.name], question) for kind in kinds}
    if question.noise is not None and answer.clients == 1:
        question.noise.check([kind for kind in kinds if isinstance(kind, Bounded)], values, answer.examples)
    return values


def _check_size(question: Question, kinds: Sequence[Statistic], answer: Answer) -> None:
    """Refuse statistics of other types, or of more bytes, than the compression asked for would give."""
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
        # Shapes are checked before anything is unpacked: a few bytes may claim to be a huge matrix.
        value = kind.parse(decode(sent, lambda shapes: kind.check_shapes(shapes, question.base)))
        kind.check_answer(value, question.base, len(question.directions))
    # A client may send any tensors, so that almost anything may be raised.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, InvalidOption) as error:
        raise InvalidOption(f"statistic {kind.name!r} cannot be read ({error})") from error
    return value
