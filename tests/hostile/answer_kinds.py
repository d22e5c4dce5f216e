"""Answers of hostile clients to questions about a merged model: ``kind(rng, answer, question)``."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedmerge.questions import Answer, Question
from fedmerge.statistics import NoisySums
from tests.hostile.kind import Kind, table
from tests.hostile.statistic_kinds import STATISTICS, spoilt_statistic

__all__ = ["ANSWERS"]


def _losses(change: Callable[[Tensor], Tensor]):
    """Of questions in which models are judged."""

    def make(rng: random.Random, answer: Answer, question: Question):
        return replace(answer, losses=change(answer.losses.clone())) if len(question.points) else None

    return make


def _at(place: int, number: float):
    def change(losses: Tensor) -> Tensor:
        losses[place] = number
        return losses

    return _losses(change)


def _favours(place: int, factor: float):
    """Sums that make one point look best, and all others worse than they are."""

    def change(losses: Tensor) -> Tensor:
        found = factor * (losses + 1)
        found[place] = 0.0
        return found

    return _losses(change)


def _told(**told: int):
    return lambda rng, answer, question: replace(answer, **told)


def _more(factor: int):
    """That many times the examples, with the sums to go with them."""

    def make(rng: random.Random, answer: Answer, question: Question):
        return replace(answer, losses=factor * answer.losses, judged=factor * answer.judged,
                       examples=factor * answer.examples)  # fmt: skip

    return make


def _statistic(kind: Kind) -> Kind:
    def make(rng: random.Random, answer: Answer, question: Question):
        found = spoilt_statistic(kind, rng, answer.statistics)
        return None if found is None else replace(answer, statistics=found)

    return replace(kind, name=f"statistic {kind.name}", place="answer", make=make)


def _unasked(rng: random.Random, answer: Answer, question: Question):
    return replace(answer, statistics={**answer.statistics, "gram": {"0.weight": torch.eye(3)}})


def _padded(rng: random.Random, answer: Answer, question: Question):
    if not answer.statistics:
        return None
    name = rng.choice(sorted(answer.statistics))
    value = {**answer.statistics[name], "padding": torch.zeros(250_000)}
    return replace(answer, statistics={**answer.statistics, name: value})


def _kind(name: str, make, must_drop: bool = True, **more: bool) -> Kind:
    return Kind(name, "answer", make, must_drop, **more)


_NUMBERS = (math.nan, math.inf, -math.inf, -1.0, -1e300)

ANSWERS = table(
    "answer",
    *(_kind(f"losses {x}", _losses(lambda t, x=x: torch.full_like(t, x)), False) for x in _NUMBERS[:2]),
    *(_kind(f"losses {x}", _losses(lambda t, x=x: torch.full_like(t, x))) for x in _NUMBERS[2:]),
    *(_kind(f"the first loss {x}", _at(0, x), must_drop=x < 0) for x in (*_NUMBERS, 1e300)),
    *(_kind(f"the last loss {x}", _at(-1, x), must_drop=x < 0) for x in (*_NUMBERS, 1e300)),
    _kind("losses 1e300", _losses(lambda t: torch.full_like(t, 1e300)), must_drop=False),
    _kind("losses 0", _losses(torch.zeros_like), must_drop=False),
    _kind("losses turned about", _losses(lambda t: t.max() - t), must_drop=False, lie=True),
    _kind("all but the last look a thousand times worse", _favours(-1, 1e3), must_drop=False, lie=True),
    _kind("all but the last look 1e12 times worse", _favours(-1, 1e12), must_drop=False, lie=True),
    _kind("all but the first look 1e12 times worse", _favours(0, 1e12), must_drop=False, lie=True),
    _kind("a loss too few", _losses(lambda t: t[:-1])),
    _kind("a loss too many", _losses(lambda t: torch.cat([t, t[:1]]))),
    _kind("losses in a table", _losses(lambda t: t[None])),
    _kind("one loss for all", _losses(lambda t: t[0])),
    *(_kind(f"{n} examples that judged", _told(judged=n), must_drop=n not in (0, 1)) for n in (0, 1, -1, 2**62)),
    *(_kind(f"{n} examples that were measured", _told(examples=n), must_drop=n not in (0, 1))
      for n in (0, 1, -1, 2**62)),
    _kind("a thousand times the examples", _more(1000)),
    _kind("no examples at all", _told(judged=0, examples=0), must_drop=False),
    _kind("no statistics", lambda rng, a, q: replace(a, statistics={}) if a.statistics else None),
    _kind("a statistic that nobody asked for", _unasked, must_drop=False),
    _kind("a million bytes of padding", _padded, must_drop=False),
    _kind("noise that nobody asked for", lambda rng, a, q: replace(a, noise=NoisySums(1.0, 1.0))
          if q.noise is None else replace(a, noise=None)),
    *(_statistic(kind) for kind in STATISTICS.values()),
)  # fmt: skip
