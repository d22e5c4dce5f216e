"""Improve a merged model step by step, and keep only what the clients' held-out examples find better.

Every step is one exchange: clients measure statistics, and the server proposes models (points along directions).
In the next exchange the clients judge which point is best, and measure the next step's statistics. So a step costs one
exchange and not two.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption, NoAnswer, TaskError
from fedmerge.questions import Answer, Ask, Question, Trust
from fedmerge.questions.pooling import added_up, sifted
from fedmerge.refine.budget import Budget, model_bytes
from fedmerge.refine.exchanged import Exchanged, Refined
from fedmerge.refine.refinement import Proposal, Refinement, Step
from fedmerge.refine.searching import SearchStep
from fedmerge.state import State
from fedmerge.statistics import NoisySums
from fedmerge.statistics.sending.settings import StatisticsSettings
from fedmerge.update import MergeContext

__all__ = ["check_asked", "refine"]

log = logging.getLogger("fedmerge")

_NEARLY, _CLOSE = 0.95, 1.02
"""A point is nearly as good as the best if it has this share of its gain in held-out loss, and its loss is at most this
many times as large."""
_STAY = Proposal((), ((),), 0)
_TRUST = Trust()


def refine(
    state: State,
    alternatives: Sequence[State],
    refinements: Sequence[Refinement],
    ask: Ask,
    clients: Sequence[int],
    settings: StatisticsSettings,
    noise: NoisySums | None = None,
    budget: float | None = None,
    frozen: Collection[str] = (),
    trust: Trust = _TRUST,
    told: Mapping[int, float] | None = None,
) -> Refined:
    """Improve a merged model by sums from its clients.

    The first step is taken from the merge and from every alternative, and the best result goes on. From then on a
    step's proposal is judged in the exchange that measures the next step's statistics. They are measured at the point
    that is likely to win. If another point turns out to be much better, they are measured again there. A proposal is
    declined if none of its points is better than the present model. A step that does not apply to the model is skipped,
    and the reason is logged and noted.

    Parameters
    ----------
    state
        The merged model, buffers included.
    alternatives
        Other merges of the same clients, such as their mean.
    refinements
        Stages, in order.
    ask, clients
        How to reach clients, and which are asked.
    settings, noise
        How they send what they measure, and the noise that they add.
    budget
        Bytes that a client may send in all exchanges.
    frozen
        Names of tensors that no step may change.
    trust
        How far single clients are believed.
    told
        How many examples each client told of in training, where that is known.
    """
    walk = _Walk(Refined(dict(state)), ask, clients, settings, noise, Budget(budget), frozen, trust, told)
    try:
        walk.through([step for refinement in refinements for step in refinement.steps(state)], alternatives)
    except NoAnswer as error:
        # Clients may be gone by now; what there is is a merge of all that they sent.
        log.warning("the merged model is refined no further: %s", error)
        walk.refined.skipped.append(("all further steps", str(error)))
        walk.settle()
    return walk.refined


def check_asked(refinements: Sequence[Refinement], context: MergeContext, state: State) -> None:
    """Make sure, before anything is merged, that clients can be asked where refinements will want to.

    Raises
    ------
    InvalidOption
        They cannot.
    """
    asking = [
        type(refinement).__name__ for refinement in refinements if refinement.steps(state) and refinement.asks(context)
    ]
    if asking and context.ask is None:
        kinds = ", ".join(dict.fromkeys(asking))
        raise InvalidOption(f"{kinds} asks clients about the merged model: pass clients=, one loader per model")


@dataclass
class _Walk:
    """How far the refinement has come: the model, and a proposal that clients have not judged yet."""

    refined: Refined
    ask: Ask
    clients: Sequence[int]
    settings: StatisticsSettings
    noise: NoisySums | None = None
    budget: Budget = field(default_factory=Budget)
    frozen: Collection[str] = ()
    trust: Trust = _TRUST
    told: Mapping[int, float] | None = None
    to_come: list[Step] = field(default_factory=list)
    proposal: Proposal | None = None
    proposed_by: str = ""
    losses: Tensor = field(default_factory=lambda: torch.zeros(0))
    ahead: Answer | None = None
    """The next step's statistics, where they were measured at the point that has won."""
    whole: State | None = None
    """The last model that won a judgement. Between the steps of a stage a model may be unusable."""

    def settle(self) -> None:
        """Give up a stage that cannot be finished: go back to the last model that won a judgement."""
        self.proposal = self.ahead = None
        if self.whole is not None:
            self.refined.state = dict(self.whole)

    def through(self, steps: list[Step], alternatives: Sequence[State]) -> None:
        """Take all steps, the first of them from every alternative."""
        memory: State = {}
        self.whole = self.refined.state
        if alternatives:
            first = next((i for i, step in enumerate(steps) if not step.prepares), len(steps)) + 1
            self.to_come = steps[first:]
            memory = self.start([self.refined.state, *alternatives], steps[:first])
            steps = steps[first:]
        for i, step in enumerate(steps):
            self.to_come = steps[i + 1 :]
            if isinstance(step, SearchStep):
                self.search(step)
                continue
            try:
                sums = self.measured(step, memory)
                if sums is not None:
                    self.proposal, memory = self.proposed(step, self.refined.state, sums, memory)
                    self.proposed_by = _name(step)
                    if self.proposal is None:
                        self.losses = torch.zeros(0)
            except TaskError:  # no step can be judged or measured
                raise
            except InvalidOption as error:
                self.refined.skip(_name(step), error)
                if self.proposal is None or len(self.proposal.points) == 1:
                    self.settle()
        self.judge()

    def proposed(self, step: Step, state: State, sums: Answer, memory: State) -> tuple[Proposal | None, State]:
        """A step's proposal without the tensors that are frozen, and its memory."""
        proposal, kept = step.propose(state, sums.statistics, memory)
        if proposal is None or not self.frozen:
            return proposal, kept
        free = [{n: t for n, t in direction.items() if n not in self.frozen} for direction in proposal.directions]
        return replace(proposal, directions=tuple(free)), kept

    def start(self, branches: Sequence[State], steps: Sequence[Step]) -> State:
        """Take the first steps from each of several models and go on with the best one; return its memory."""
        proposals: list[Proposal] = [_STAY] * len(branches)
        memories: list[State] = [{}] * len(branches)
        for step in steps:
            # The steps before the last one only make models comparable: their proposals are taken unjudged.
            pairs = zip(proposals, branches, strict=True)
            branches = [proposal.around(branch).point(proposal.preferred) for proposal, branch in pairs]
            proposals = [_STAY] * len(branches)
            try:
                answers = self._asked([step.question(*pair) for pair in zip(branches, memories, strict=True)], step)
                for i, (branch, sums) in enumerate(zip(branches, answers, strict=True)):
                    proposal, memories[i] = self.proposed(step, branch, sums, memories[i])
                    proposals[i] = proposal or proposals[i]
            except TaskError:  # no step can be judged or measured
                raise
            except InvalidOption as error:
                self.refined.skip(_name(step), error)
        questions = [proposal.around(branch) for proposal, branch in zip(proposals, branches, strict=True)]
        answers = self._asked(questions)
        losses = [answer.loss for answer in answers]
        best = min(range(len(branches)), key=lambda i: float(losses[i].min()))
        log.info(
            "held-out losses after the first step: %s", [round(float(point_losses.min()), 4) for point_losses in losses]
        )
        self.proposed_by = _name(steps[-1]) if steps else "merge"
        self._move(questions[best], answers[best])
        return memories[best]

    def search(self, step: SearchStep) -> None:
        """Carry out a search and move to the best model that it has seen."""
        self.judge()
        sought = step.sought(self.refined.state, self.frozen, step.answering or (lambda point: self._asked([point])[0]))
        log.info("%s: objective %.4f", step.name, sought.value)
        last = Exchanged("", math.nan, (), (), sought.state, 0) if step.answering else self.refined.exchanges.pop()
        last = replace(last, judged=step.name, loss=sought.value, point=sought.moved, state=sought.state)
        self.refined.exchanges.append(last)
        self.refined.state, self.whole, self.losses = dict(sought.state), sought.state, torch.zeros(0)

    def measured(self, step: Step, memory: State) -> Answer | None:
        """The statistics of a step, at the best point of the last proposal; None where the step is not wanted."""
        if self.proposal is not None:
            self.judge(None if step.expensive or self.proposal.preferred is None else step)
        ahead, self.ahead = self.ahead, None
        if not step.wanted(self.losses, memory):
            return None
        return ahead or self._asked([step.question(self.refined.state, memory)], step)[0]

    def judge(self, step: Step | None = None) -> None:
        """Have the open proposal judged and move to its best point.

        The statistics of `step` are measured in the same exchange, at the point that is likely to win.
        """
        if self.proposal is not None:
            question = self.proposal.around(self.refined.state)
            (answer,) = self._asked([question], step)
            self._move(question, answer, step)

    def _move(self, question: Question, answer: Answer, then: Step | None = None) -> None:
        """Move to the point with the least loss, or to one nearly as good where statistics for `then` exist already."""
        losses = answer.loss
        chosen = int(torch.argmin(losses))
        if then is not None and question.at is not None:
            stays, guess, best = (float(losses[i]) for i in (0, question.at, chosen))
            nearly = stays - guess >= _NEARLY * (stays - best) and guess <= _CLOSE * best
            if chosen == question.at or (guess < stays and nearly):
                chosen, self.ahead = question.at, answer
        self.refined.state, self.losses, self.proposal = question.point(chosen), losses, None
        if len(losses) > 1:
            self.whole = self.refined.state
        log.info("%s: held-out loss %.4f to %.4f", self.proposed_by, float(losses[0]), float(losses[chosen]))
        self.refined.exchanges[-1] = replace(
            self.refined.exchanges[-1],
            judged=self.proposed_by,
            loss=float(losses[chosen]),
            point=question.points[chosen],
            state=self.refined.state,
        )

    def _asked(self, questions: Sequence[Question], step: Step | None = None) -> list[Answer]:
        """Put questions to the clients in one exchange, leave out bad answers, and add up the others."""
        needs = questions[0].needs if step is None else step.needs()
        kinds = tuple(self.settings.applied(kind) for kind in needs)
        asked = [replace(question, needs=kinds, noise=self.noise) for question in questions]
        state = questions[0].base
        allowed = None
        if step is not None:
            points = sum(len(question.points) for question in questions)
            allowed = self.budget.allowed(step, state, self.to_come, len(questions), points)
        if allowed is not None:
            share = allowed / model_bytes(state)
            asked = [replace(question, compression="auto", budget=share) for question in asked]
        replies = self.ask(asked, self.clients)
        good, refused = sifted(asked, replies, self.trust, self.told, self.clients)
        sent = self.budget.spend(replies, refused)
        answers = added_up(asked, good, self.trust)
        self.clients = [client for client in self.clients if client not in refused]
        names, left_out = tuple(kind.name for kind in kinds), tuple(sorted(refused.items()))
        exchanged = Exchanged("", float("nan"), (), names, self.refined.state, len(asked), sent, left_out)
        self.refined.exchanges.append(exchanged)
        return answers


def _name(step: Step) -> str:
    return type(step).__name__
