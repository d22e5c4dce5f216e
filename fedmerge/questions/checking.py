"""What has to be so of one client's answers before they count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmerge.errors import InvalidOption
from fedmerge.questions.answering import DIVERGED, judging
from fedmerge.questions.question import Answer, Question
from fedmerge.state import State
from fedmerge.statistics import Statistic
from fedmerge.statistics.sending.compression import bounded_bytes, check_forms, decode
from fedmerge.statistics.sending.noise import Bounded

__all__ = ["checked"]


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
    if clients < 1 or judged > judging(total, question.holdout) + clients - 1:
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
