"""From client updates to the next global model.

Updates are checked and split into parameters and buffers (intake). The aggregator combines the parameters, server steps
move the result, and the merged buffers are joined with it. At last refinements ask clients about the merged model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator, Fold
from fedmerge.aggregators.aligning import Aligning
from fedmerge.checks.validation import common_form
from fedmerge.edits.edit import Edit, edited, edited_rows, remembered
from fedmerge.errors import BadUpdate, InvalidOption, NoUsableUpdates
from fedmerge.layout import BatchNormPolicy, Layout
from fedmerge.merging.bounds import bounded_state, check_step
from fedmerge.merging.buffers import BufferFold, check_policy
from fedmerge.merging.complex_check import check_complex
from fedmerge.merging.intake import Intake, Partial
from fedmerge.merging.judged_model import judged, losses_of_clients
from fedmerge.merging.passed import Passed
from fedmerge.merging.repair import repair_matched
from fedmerge.merging.result import MergeResult
from fedmerge.merging.statistics_reader import StatisticsReader
from fedmerge.questions import Answer, Question, Trust, bringing
from fedmerge.refine.budget import FIRST_SHARE, Billed, model_bytes
from fedmerge.refine.exchanged import Exchanged
from fedmerge.refine.guard import check_asked, refine
from fedmerge.refine.privacy import Privacy
from fedmerge.refine.refinement import Refinement
from fedmerge.server_steps import ServerStep
from fedmerge.state import State, as_pairs, cast_like, from_pairs, is_norm_statistic, prefixed, with_prefix
from fedmerge.statistics import Statistic, StatisticsSettings
from fedmerge.trajectories import Trajectory, TrajectoryContext
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

__all__ = ["Pipeline"]

log = logging.getLogger("fedmerge")


@dataclass(frozen=True)
class Pipeline:
    """An aggregator with what surrounds it; a named method is a pipeline with everything at its default.

    Parameters
    ----------
    aggregator
        Combines the clients' parameters.
    edits
        Change each client's update before that, one after the other.
    server_steps
        Taken in order after combining; each keeps its own memory.
    batch_norm
        Policy for batch-norm statistics, see :data:`~fedmerge.layout.BatchNormPolicy`. Under
        ``"recalibrate"`` the result holds their mean until whoever has data has measured them afresh.
    on_bad_update
        ``"drop"`` leaves a bad update out with a warning, ``"raise"`` makes it an error.
    min_updates
        Fewest good updates to merge.
    statistics
        How clients measure and send what the aggregator needs.
    repair
        What follows a method that re-orders neurons: ``"auto"`` measures batch norms anew on the server's data,
        where there are both; ``"rescale"`` also corrects every layer (REPAIR), which needs data.
    refinements
        Taken last, with further exchanges: clients send sums at the merged model, and judge what comes of them.
    privacy
        How those answers are protected, see :class:`~fedmerge.refine.privacy.Privacy`.
    trust
        How far single clients are believed in them, see :class:`~fedmerge.questions.Trust`.
    trajectories
        Make an average over rounds of what comes of all this, which the round ends with.
    """

    aggregator: Aggregator
    server_steps: tuple[ServerStep, ...] = ()
    batch_norm: BatchNormPolicy = "mean"
    on_bad_update: Literal["drop", "raise"] = "drop"
    min_updates: int = 1
    statistics: StatisticsSettings = field(default_factory=StatisticsSettings)
    repair: Literal["auto", "rescale", "none"] = "auto"
    refinements: tuple[Refinement, ...] = ()
    privacy: Privacy = field(default_factory=Privacy)
    trust: Trust = field(default_factory=Trust)
    edits: tuple[Edit, ...] = ()
    trajectories: tuple[Trajectory, ...] = ()

    def __post_init__(self) -> None:
        check_policy(self.batch_norm)
        if self.on_bad_update not in ("drop", "raise"):
            raise InvalidOption(f'on_bad_update must be "drop" or "raise", got {self.on_bad_update!r}')
        if self.repair not in ("auto", "rescale", "none"):
            raise InvalidOption(f'repair must be "auto", "rescale" or "none", got {self.repair!r}')
        least = self.min_updates
        if isinstance(least, bool) or not isinstance(least, int) or least < 1:
            raise InvalidOption(f"min_updates must be at least 1, an integer, got {least!r} (min_clients)")
        self.privacy.check(self.aggregator, self.refinements, self.batch_norm)
        if self.privacy != Privacy() and any(one.asks for one in self.trajectories):
            names = ", ".join(type(one).__name__ for one in self.trajectories if one.asks)
            raise InvalidOption(f"{names} has clients judge models, which privacy does not cover: leave one out")
        if self.privacy.masks and self.trust not in (Trust(), Trust("mean", "mean")):
            raise InvalidOption(f"{self.trust} cannot look at single answers under masks: leave out one of the two")

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics that clients must measure after training."""
        return tuple(statistic.name for statistic in self.measured)

    @property
    def measured(self) -> tuple[Statistic, ...]:
        """The statistics themselves, as clients are to measure them."""
        return tuple(self.statistics.applied(statistic) for statistic in self.aggregator.needs)

    @property
    def compares(self) -> bool:
        """Whether clients have to keep the model that they trained until the merge is over."""
        return any(one.compares for one in self.refinements)

    @property
    def sent_as(self) -> StatisticsSettings:
        """How clients send what they measure after training; a share of the method's budget, where it has one."""
        if self.aggregator.upload is None:
            return self.statistics
        return replace(self.statistics, compression="auto", budget=FIRST_SHARE * self._extra)

    @property
    def _extra(self) -> float:
        """What a client may send besides its model, in models."""
        return (self.aggregator.upload or 1.0) - 1.0

    def sent_with_model(self, memory: State) -> State:
        """Tensors of the local rule that go out beside the model, of what :meth:`merge` remembered last."""
        return self.aggregator.sent_with_model(prefixed("aggregator", memory))

    def merge(
        self,
        updates: Iterable[ClientUpdate | BadUpdate],
        context: MergeContext,
        memory: State | None = None,
        *,
        buffers: Collection[str] | None = None,
    ) -> MergeResult:
        """Merge client updates into the next global state.

        Parameters
        ----------
        updates
            A sequence, which is sorted by client first, or a stream, which must come in client order and
            is read once, one model in memory at a time; all of them where the method needs statistics that clients have
            to agree on. What could not even be decoded comes as a BadUpdate.
        context
            Base model, round, seed.
        memory
            ``MergeResult.memory`` of the round before.
        buffers
            Names of the model's buffers, where its module is at hand; otherwise they are told by name.

        Raises
        ------
        NoUsableUpdates
            Fewer than ``min_updates`` good updates.
        BadUpdate
            A bad update, under ``on_bad_update="raise"``.
        """
        memory = memory or {}
        if isinstance(updates, Sequence):
            updates = sorted(updates, key=lambda update: update.client)
        reference = context.base
        if reference is None:
            updates = list(updates)
            readable = [update for update in updates if isinstance(update, ClientUpdate)]
            if not readable:
                raise NoUsableUpdates("there is no update to merge")
            reference = common_form([update.state for update in readable])
        layout = context.layout or Layout.of(reference, buffers, context.tied)
        check_complex(self, reference, layout)
        inner = _inner(context, layout)
        check_asked(self.refinements, context, reference)
        reader = StatisticsReader(self.measured)
        if any(kind.agreed for kind in self.measured) or not isinstance(updates, Iterator):
            updates = list(updates) if isinstance(updates, Iterator) else updates
            reader = StatisticsReader.hearing(self.measured, updates, reference, context)
        intake, passed = self._intake(reference, layout, context, self._refuse, reader), Passed()
        inner = replace(inner, left_out=lambda: len(intake.dropped))
        read = intake.read(updates, self.min_updates)
        if self.refinements and not isinstance(self.aggregator, Fold):
            read = passed.by(read, self.aggregator.falls_back)
        if self.edits:
            read = (edited(self.edits, update, inner, memory) for update in read)
        if any(one.combines for one in self.refinements):
            read = passed.keeping(read)
        try:
            merged, own = self.aggregator.merge(read, inner, prefixed("aggregator", memory))
        except NoUsableUpdates as error:
            raise NoUsableUpdates(str(error), intake.dropped) from error
        return self._completed(merged, own, intake, context, memory, passed)

    def fold(self, blocks: Iterable[StackedUpdates], context: MergeContext, buffers: Collection[str] | None) -> Partial:
        """The sum over some of the clients, for methods that are sums: what a worker sends instead of its models.

        `context` needs its base. Bad updates are left out here already, and named in what comes back.
        """
        base, aggregator = context.required_base("a fold"), self._folding
        layout = context.layout or Layout.of(base, buffers, context.tied)
        check_complex(self, base, layout)
        intake, inner = self._intake(base, layout, context, _wait), _inner(context, layout)
        total = aggregator.zero(inner)
        for block in blocks:
            good = intake.read_stacked(block)
            if good.clients:
                good = edited_rows(self.edits, good, inner) if self.edits else good
                total = aggregator.add_stacked(total, good, inner)
        return Partial(total, intake.buffers, intake.accepted, intake.dropped, intake.unmoved, intake.outliers)

    def join(self, first: Partial, second: Partial) -> Partial:
        """The sum over the clients of both, whose memory it may reuse."""
        return Partial(
            self._folding.join(first.total, second.total),
            first.buffers.join(second.buffers),
            first.accepted + second.accepted,
            first.dropped + second.dropped,
            first.unmoved.join(second.unmoved),
            first.outliers.join(second.outliers),
        )

    def finish(
        self, partial: Partial, context: MergeContext, memory: State | None, buffers: Collection[str] | None
    ) -> MergeResult:
        """Merge what :meth:`fold` and :meth:`join` made of all clients; `partial` is used up.

        Raises
        ------
        NoUsableUpdates
            Fewer than ``min_updates`` good updates.
        BadUpdate
            A bad update, under ``on_bad_update="raise"``.
        """
        base, memory = context.required_base("a fold"), memory or {}
        check_asked(self.refinements, context, base)
        layout = context.layout or Layout.of(base, buffers, context.tied)
        intake = self._intake(base, layout, context, self._refuse)
        intake.take(partial)
        intake.refuse(self._refuse)
        total, inner = partial.total, _inner(context, layout)
        for update in intake.late():
            whole = edited(self.edits, update, inner, memory) if self.edits else update
            total = self._folding.add(total, whole, inner)
        intake.check_number(self.min_updates)
        merged, own = self._folding.finish(total, inner, prefixed("aggregator", memory))
        return self._completed(merged, own, intake, context, memory)

    @property
    def folds(self) -> bool:
        """Whether sums over some of the clients may be taken apart from the others, by :meth:`fold`."""
        return isinstance(self.aggregator, Fold) and not any(edit.remembers for edit in self.edits)

    @property
    def _folding(self) -> Fold[Any]:
        if not isinstance(self.aggregator, Fold):
            raise InvalidOption(f"{type(self.aggregator).__name__} is no sum over clients: pass its updates to merge()")
        return self.aggregator

    def _judged(
        self, state: dict[str, Tensor], intake: Intake, context: MergeContext, memory: State
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The average over rounds that this round ends with, and the memory of whoever makes it."""
        layout, told, ask = intake.layout, intake.told if context.told is None else context.told, context.ask
        norms = [name for name in layout.float_buffers if is_norm_statistic(name)]
        averaged = [name for name in (*layout.parameters, *norms) if name in state and name not in layout.still]

        def known(model: State) -> TrajectoryContext:
            asks = None if ask is None else losses_of_clients(ask, intake.accepted, model, self._knowing(context), told)
            return TrajectoryContext(context.round, context.base, asks)

        ends, kept = judged(self.trajectories, state, averaged, known, memory)
        _tie(ends, context)
        return ends, kept

    def _left(self, model: State) -> float | None:
        """Bytes that a client may still send for refinements; None where nothing bounds them."""
        if self.aggregator.upload is None:
            return None
        return self._extra * model_bytes(model) * (1 - FIRST_SHARE if self.needs else 1)

    def _knowing(self, context: MergeContext) -> Trust:
        """What clients are believed, with what is known of the losses of the task."""
        if self.trust.lowest_loss is not None or context.task is None:
            return self.trust
        return replace(self.trust, lowest_loss=context.task.lowest_loss)

    def _refuse(self, bad: BadUpdate) -> None:
        if self.on_bad_update == "raise":
            raise bad
        log.warning("dropped: %s", bad)

    def _intake(
        self,
        reference: State,
        layout: Layout,
        context: MergeContext,
        on_bad: Callable[[BadUpdate], None],
        statistics: StatisticsReader | None = None,
    ) -> Intake:
        # Whoever hands over models at hand knows why one is so much larger than the others.
        settings = {"rescaled": self.repair == "rescale", "keeping": self.compares}
        settings["comparing"] = self.on_bad_update == "drop"
        folded, reader = (
            BufferFold(layout, self.batch_norm, context.base),
            statistics or StatisticsReader(self.measured),
        )
        return Intake(self.aggregator, reference, folded, layout, context, reader, on_bad=on_bad, **settings)

    def _completed(
        self,
        merged: State,
        own: State,
        intake: Intake,
        context: MergeContext,
        memory: State,
        passed: Passed | None = None,
    ) -> MergeResult:
        """Server steps, buffers, repair and refinements after combining; `passed` is what was combined."""
        method, reference, inner = type(self.aggregator).__name__, intake.reference, _inner(context, intake.layout)
        base = inner.base
        next_memory = with_prefix("aggregator", own)
        next_memory |= remembered(self.edits, merged, inner, memory)
        for i, step in enumerate(self.server_steps):
            if base is None:
                raise InvalidOption(f"{type(step).__name__} steps from the model all clients started from: pass base=.")
            before = base, bounded_state(merged, method)
            merged, own = step.step(*before, prefixed(f"step{i}", memory))
            check_step(merged, before, type(step).__name__)
            next_memory |= with_prefix(f"step{i}", own)
        frozen, merged = {**intake.still, **intake.unmoved.tensors}, from_pairs(merged, reference)
        merged = bounded_state(merged, method, reference)
        state = cast_like({**merged, **intake.buffers.finish(context.base), **frozen}, reference)
        _tie(state, context)
        if isinstance(self.aggregator, Aligning) and len(intake.accepted) > 1 and self.repair != "none":
            norms = self.batch_norm not in ("recalibrate", "local")
            norms = norms and not any(one.measures_norms for one in self.refinements)
            repair_matched(state, context, method, intake.rescale, norms=norms, frozen=frozen)
        exchanges: tuple[Exchanged, ...] = ()
        answers = 0
        skipped: tuple[tuple[str, str], ...] = ()
        if self.refinements:
            models = [] if passed is None else passed.models()
            models_kept, recalled = [] if passed is None else passed.kept, prefixed("aggregator", memory)
            knowing = _inner(context, intake.layout)
            if self.aggregator.falls_back and context.round > 1 and context.base is not None:
                models.append(context.base)  # no merge of clients whose training went astray is to replace it
            others = [cast_like({**state, **model, **frozen}, state) for model in models]
            billed = Billed(context.ask or _nobody)
            ask = bringing(self.privacy.protected(billed, context.round), intake.moved or {})
            told = intake.told if context.told is None else context.told
            refined = refine(
                state,
                others,
                [one.knowing(models_kept, knowing, recalled) for one in self.refinements],
                ask,
                intake.accepted,
                self.statistics,
                self.privacy.noise,
                self._left(reference),
                frozen,
                self._knowing(context),
                told,
            )
            state, exchanges, answers = refined.state, tuple(refined.exchanges), billed.questions
            skipped = tuple(refined.skipped)
            _tie(state, context)
        if self.trajectories:
            state, kept = self._judged(state, intake, context, memory)
            next_memory |= kept
        return MergeResult(
            {name: state[name] for name in reference if name in state},
            next_memory,
            tuple(sorted(intake.accepted)),
            tuple(intake.dropped),
            exchanges,
            answers,
            skipped,
        )


def _tie(state: dict[str, Tensor], context: MergeContext) -> None:
    """Give shared tensors their value under all their names."""
    state.update({alias: state[name] for alias, name in context.tied.items() if name in state})


def _nobody(questions: Sequence[Question], clients: Sequence[int]) -> Sequence[tuple[int, Sequence[Answer]]]:
    """Clients where none can be reached, which is checked before anything is merged."""
    return ()


def _wait(bad: BadUpdate) -> None:
    """Do nothing: a worker only notes bad updates, and whoever joins the workers' sums reports them."""


def _inner(context: MergeContext, layout: Layout) -> MergeContext:
    """The context as aggregators see it: its base has trained parameters only."""
    base = None if context.base is None else as_pairs({n: context.base[n] for n in layout.parameters})
    return replace(context, base=base, known=_known(context, layout))


def _known(context: MergeContext, layout: Layout) -> State:
    """Tensors of the base that do not travel, for every client has them."""
    return {name: context.base[name] for name in layout.still} if context.base is not None else {}
