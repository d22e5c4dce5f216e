"""What clients are asked about a merged model: refinements of it, and what averages over rounds go by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedmerge.merging.chain import Chain
from fedmerge.merging.intake import Intake
from fedmerge.merging.judged_model import judged, losses_of_clients
from fedmerge.questions import Answer, Ask, Question, bringing
from fedmerge.refine.budget import Billed
from fedmerge.refine.exchanged import Exchanged
from fedmerge.refine.guard import refine
from fedmerge.state import State, WeightedSum, cast_like, is_norm_statistic, prefixed
from fedmerge.trajectories import TrajectoryContext
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Passed", "Refinement", "averaged", "refined"]


@dataclass
class Passed:
    """What updates leave behind as they pass: often a better start for what follows than what is made of them."""

    mean: WeightedSum = field(default_factory=WeightedSum)
    largest: ClientUpdate | None = None
    kept: list[ClientUpdate] = field(default_factory=list)

    def by(self, updates: Iterable[ClientUpdate], alone: bool) -> Iterator[ClientUpdate]:
        """The updates; the largest client's is kept where it may stand `alone`."""
        for update in updates:
            self.mean.add(update.state, update.weight)
            if alone and (self.largest is None or update.weight > self.largest.weight):
                self.largest = update
            yield update

    def keeping(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """The updates, which all are kept for what searches among them."""
        for update in updates:
            self.kept.append(update)
            yield update

    def models(self) -> list[State]:
        """Their mean, and the largest client's; none where all were kept."""
        if self.kept:  # a search has its own start
            return []
        found: list[State] = [self.mean.mean()] if self.mean.weight else []
        return found if self.largest is None else [*found, self.largest.state]


@dataclass(frozen=True)
class Refinement:
    """A refined model, and what it took: see the fields of :class:`~fedmerge.merging.result.MergeResult`."""

    state: dict[str, Tensor]
    exchanges: tuple[Exchanged, ...]
    answers: int
    skipped: tuple[tuple[str, str], ...]


def refined(
    chain: Chain,
    state: State,
    frozen: State,
    intake: Intake,
    context: MergeContext,
    inner: MergeContext,
    memory: State,
    passed: Passed | None,
) -> Refinement:
    """Let the refinements of a chain ask the clients of a merge about its model.

    Parameters
    ----------
    chain
        Whose refinements.
    state
        The merged model, buffers included.
    frozen
        Tensors of it that no step may change.
    intake
        Who was merged, and their models where neurons have moved.
    context, inner
        Of the merge, and as aggregators see it.
    memory
        The pipeline's, of the round before.
    passed
        What was combined, where updates passed one by one.
    """
    models = [] if passed is None else passed.models()
    models_kept, recalled = [] if passed is None else passed.kept, prefixed("aggregator", memory)
    if chain.aggregator.falls_back and context.round > 1 and context.base is not None:
        models.append(context.base)  # no merge of clients whose training went astray is to replace it
    others = [cast_like({**state, **model, **frozen}, state) for model in models]
    billed = Billed(context.ask or _nobody)
    ask: Ask = chain.privacy.protected(billed, context.round) if chain.privacy.masks else billed
    done = refine(
        state,
        others,
        [one.knowing(models_kept, inner, recalled) for one in chain.refinements],
        bringing(ask, intake.moved or {}),
        intake.accepted,
        chain.statistics,
        chain.privacy.noise,
        chain.bytes_left(intake.reference),
        frozen,
        chain.believed(context),
        _told(intake, context),
    )
    return Refinement(done.state, tuple(done.exchanges), billed.questions, tuple(done.skipped))


def averaged(
    chain: Chain, state: dict[str, Tensor], intake: Intake, context: MergeContext, memory: State
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The average over rounds that this round ends with, and the memory of whoever makes it."""
    layout, ask = intake.layout, context.ask
    norms = [name for name in layout.float_buffers if is_norm_statistic(name)]
    names = [name for name in (*layout.parameters, *norms) if name in state and name not in layout.still]

    def known(model: State) -> TrajectoryContext:
        asks = None
        if ask is not None:
            asks = losses_of_clients(ask, intake.accepted, model, chain.believed(context), _told(intake, context))
        return TrajectoryContext(context.round, context.base, asks)

    return judged(chain.trajectories, state, names, known, memory)


def _told(intake: Intake, context: MergeContext) -> Mapping[int, float]:
    """By client, the examples that it claims to have trained on."""
    return intake.told if context.told is None else context.told


def _nobody(questions: Sequence[Question], clients: Sequence[int]) -> Sequence[tuple[int, Sequence[Answer]]]:
    """Clients where none can be reached, which is checked before anything is merged."""
    return ()
