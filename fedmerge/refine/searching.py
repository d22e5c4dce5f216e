"""The stage in which a method's search is carried out: clients, or the server's data, judge what it tries."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedmerge.aggregators.searched import Searched
from fedmerge.errors import InvalidOption, NoAnswer
from fedmerge.inputs import examples_in
from fedmerge.questions import Answer, Question, respond
from fedmerge.refine.refinement import Proposal, Refinement, Step, Sums
from fedmerge.searching.search import Judged, Problem, Span, Trial
from fedmerge.seeding import integer_seed
from fedmerge.state import State, cast_like
from fedmerge.statistics import Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["SearchStep", "Searching", "Sought"]

log = logging.getLogger("fedmerge")


@dataclass(frozen=True)
class Sought:
    """The best model that a search has seen, its coefficients' change from the start, and its objective."""

    state: State
    moved: tuple[float, ...]
    value: float


@dataclass(frozen=True)
class Searching(Refinement):
    """What follows the merge of a method that searches; it needs the models that were merged.

    Parameters
    ----------
    method
        Whose search it is.
    span
        The models among which it searches, once they are known.
    context
        The merge's.
    models
        How many were merged.
    """

    method: Searched
    span: Span | None = None
    context: MergeContext | None = None
    models: int = 0

    combines: ClassVar[bool] = True

    def asks(self, context: MergeContext) -> bool:
        """Whether clients have to be asked, for the server cannot judge.

        Raises
        ------
        InvalidOption
            It is to judge and cannot.
        """
        name, judge = type(self.method).__name__, self.method.judge
        if not self.method.evaluations or judge == "clients":
            return bool(self.method.evaluations)
        problem = self._lacking(context)
        if judge == "server" and problem:
            raise InvalidOption(f"{name} judges models on the server, and {problem}, or say judge=clients")
        if problem and context.ask is None:
            raise InvalidOption(
                f"{name} has nobody to judge models: {problem}, or pass clients=, one loader per model; "
                "evaluations=0 takes the start of the search as it is"
            )
        return bool(problem)

    def _lacking(self, context: MergeContext) -> str:
        """What the server has not that judging takes; empty where it has all."""
        if context.data is None:
            return "it has no data: pass data= (server_examples in a configuration)"
        if context.model_fn is None:
            return "it does not know the model: pass model_fn="
        if context.layout is not None and context.layout.personal:
            return f"{context.layout.personal[0]!r} is personal: only clients have a whole model"
        first = next(iter(context.data), None)
        if first is None or not (self.method.unlabelled or _labelled(first)):
            return "its data have no labels: pass data= with (inputs, targets) batches"
        return ""

    def knowing(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> Searching:
        """The stage with the models that were merged."""
        read = tuple(updates)
        return replace(self, span=self.method.span(read, context, memory), context=context, models=len(read))

    def steps(self, state: State) -> tuple[Step, ...]:
        """The search."""
        return (SearchStep(self),) if self.method.evaluations else ()


@dataclass(frozen=True)
class SearchStep(Step):
    """A search of many exchanges: :meth:`sought` takes the place of a proposal."""

    stage: Searching

    @property
    def name(self) -> str:
        """Of the method."""
        return type(self.stage.method).__name__

    def needs(self) -> tuple[Statistic, ...]:
        """What clients may be asked to measure."""
        return self.stage.method.measured_in_search

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """Nothing: all is found in the search."""
        return None, memory

    @cached_property
    def answering(self) -> Callable[[Question], Answer] | None:
        """The server's own answers, where it judges."""
        context = self.stage.context
        if context is None or self.stage.asks(context):
            return None
        module = context.module({}, self.name)
        shown = list(context.data or ())
        pairs = shown if _labelled(shown[0]) else [(x, torch.zeros(examples_in(x))) for x in map(_inputs, shown)]
        whole = {**module.state_dict(), **context.known}

        def answer(question: Question) -> Answer:
            return respond(replace(question, base={**whole, **question.base}), module, pairs, task=context.task)

        return answer

    def sought(self, state: State, frozen: Collection[str], ask: Callable[[Question], Answer]) -> Sought:
        """The best model of a search from `state`, that one among them; where nobody answers any more, so far."""
        stage, method = self.stage, self.stage.method
        if stage.span is None or stage.context is None:
            raise InvalidOption(f"{self.name} searches among models that it has not been told of")
        span, context = stage.span, stage.context
        directions = tuple({n: t for n, t in direction.items() if n not in frozen} for direction in span.directions)
        labelled = self.answering is None or _labelled(next(iter(context.data or ()), None))
        seed = integer_seed(context.seed, self.name, context.round)
        best = Sought(state, (0.0,) * len(span.start), math.inf)
        free = Span(span.origin, directions, span.start)
        search = method.search(Problem(span.start, seed, stage.models, labelled, free))
        trial = next(search, None)
        while trial is not None:
            moved = trial.points - span.start
            try:
                judged = _judged(ask(_question(state, directions, moved, trial)), trial)
            except NoAnswer as error:
                if math.isinf(best.value) and trial.state is None:
                    raise
                log.warning("%s: the search ends early: %s", self.name, error)
                break
            values = judged.values if trial.penalties is None else judged.values + trial.penalties
            chosen = int(values.nan_to_num(nan=math.inf).argmin())
            if float(values[chosen]) < best.value:
                at = _moved(state, directions, moved[chosen])
                best = Sought(at, tuple(moved[chosen].tolist()), float(values[chosen]))
            try:
                trial = search.send(judged)
            except StopIteration as ended:
                trial = None
                if ended.value is not None:
                    best = Sought(cast_like({**state, **ended.value}, state), (), math.nan)
        return best


def _question(state: State, directions: tuple[State, ...], moved: Tensor, trial: Trial) -> Question:
    """What those who judge are asked; all of their examples count, for a few coefficients learn none by heart."""
    if trial.state is not None:
        needs = () if trial.slopes is None else (trial.slopes,)
        return Question(cast_like({**state, **trial.state}, state), needs=needs, holdout=0)
    if trial.slopes is None:
        return Question(state, directions, tuple(tuple(point) for point in moved.tolist()), holdout=1)
    return Question(_moved(state, directions, moved[0]), directions, needs=(trial.slopes,), holdout=0)


def _moved(state: State, directions: tuple[State, ...], by: Tensor) -> dict[str, Tensor]:
    return Question(state, directions, (tuple(by.tolist()),)).point(0)


def _judged(answer: Answer, trial: Trial) -> Judged:
    if trial.slopes is None:
        return Judged(answer.loss)
    measured = answer.statistics[trial.slopes.name]
    if trial.state is not None:
        return Judged(torch.full((1,), math.nan), gradient=measured)
    return Judged(measured["value"].double().cpu(), measured["slope"].double().cpu())


def _labelled(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch
