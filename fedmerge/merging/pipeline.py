"""From client updates to the next global model.

Updates are checked and split into parameters and buffers (intake). The aggregator combines the parameters, server steps
move the result, and the merged buffers are joined with it. At last refinements ask clients about the merged model.
Parts that a method does not have are not visited.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from fedmerge.aggregators.aggregator import Fold
from fedmerge.aggregators.aligning import Aligning
from fedmerge.aggregators.routed import Routed
from fedmerge.checks.magnitudes import bounded_state, check_step
from fedmerge.checks.validation import common_form
from fedmerge.edits.edit import edited, edited_rows, remembered
from fedmerge.errors import BadUpdate, InvalidOption, NoUsableUpdates
from fedmerge.layout import Layout
from fedmerge.merging.buffers import BufferFold
from fedmerge.merging.chain import Chain
from fedmerge.merging.intake import Intake
from fedmerge.merging.refined_merge import Passed, averaged, refined
from fedmerge.merging.repair import repair_matched
from fedmerge.merging.result import MergeResult, Partial, routing_memory
from fedmerge.merging.statistics_reader import StatisticsReader
from fedmerge.refine.guard import check_asked
from fedmerge.state import State, as_pairs, cast_like, from_pairs, is_norm_statistic, prefixed, with_prefix
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

__all__ = ["Pipeline"]

log = logging.getLogger("fedmerge")


@dataclass(frozen=True)
class Pipeline(Chain):
    """A chain of parts with what makes it robust: from all that clients sent to the next global model.

    A named method is a pipeline with everything at its default.

    Parameters
    ----------
    aggregator, server_steps, batch_norm, statistics, repair, refinements, privacy, trust, edits, trajectories
        See :class:`~fedmerge.merging.chain.Chain`.
    on_bad_update
        ``"drop"`` leaves a bad update out with a warning, ``"raise"`` makes it an error.
    min_updates
        Fewest good updates to merge.
    """

    on_bad_update: Literal["drop", "raise"] = "drop"
    min_updates: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_bad_update not in ("drop", "raise"):
            raise InvalidOption(f'on_bad_update must be "drop" or "raise", got {self.on_bad_update!r}')
        least = self.min_updates
        if isinstance(least, bool) or not isinstance(least, int) or least < 1:
            raise InvalidOption(f"min_updates must be at least 1, an integer, got {least!r} (min_clients)")

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
        layout, inner = self._begun(reference, context, buffers)
        if self.refinements:
            check_asked(self.refinements, context, reference)
        reader = StatisticsReader(self.measured) if self.measured else None
        if self.measured and (any(kind.agreed for kind in self.measured) or not isinstance(updates, Iterator)):
            updates = list(updates) if isinstance(updates, Iterator) else updates
            reader = StatisticsReader.hearing(self.measured, updates, reference, context)
        intake, passed = self._intake(reference, layout, context, self._refuse, reader), Passed()
        inner = replace(inner, left_out=lambda: len(intake.dropped))
        read = intake.read(updates, self.min_updates)
        if self.refinements and not isinstance(self.aggregator, Fold):
            read = passed.by(read, self.aggregator.falls_back)
        if self.edits:
            read = (edited(self.edits, update, inner, memory) for update in read)
        if isinstance(self.aggregator, Routed) or any(one.combines for one in self.refinements):
            read = passed.keeping(read)
        try:
            merged, own = self.aggregator.merge(read, inner, prefixed("aggregator", memory))
        except NoUsableUpdates as error:
            raise NoUsableUpdates(str(error), intake.dropped) from error
        return self._completed(merged, own, intake, context, inner, memory, passed)

    def fold(self, blocks: Iterable[StackedUpdates], context: MergeContext, buffers: Collection[str] | None) -> Partial:
        """The sum over some of the clients, for methods that are sums: what a worker sends instead of its models.

        `context` needs its base. Bad updates are left out here already, and named in what comes back.
        """
        base, aggregator = context.base or context.required_base("a fold"), self._folding
        layout, inner = self._begun(base, context, buffers)
        intake = self._intake(base, layout, context, _wait, StatisticsReader(self.measured) if self.measured else None)
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
            None if first.unmoved is None or second.unmoved is None else first.unmoved.join(second.unmoved),
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
        base, memory = context.base or context.required_base("a fold"), memory or {}
        if self.refinements:
            check_asked(self.refinements, context, base)
        layout, inner = self._begun(base, context, buffers)
        intake = self._intake(base, layout, context, self._refuse)
        intake.take(partial)
        intake.refuse(self._refuse)
        total = partial.total
        for update in intake.late():
            whole = edited(self.edits, update, inner, memory) if self.edits else update
            total = self._folding.add(total, whole, inner)
        intake.check_number(self.min_updates)
        merged, own = self._folding.finish(total, inner, prefixed("aggregator", memory))
        return self._completed(merged, own, intake, context, inner, memory, None)

    def _begun(
        self, reference: State, context: MergeContext, buffers: Collection[str] | None
    ) -> tuple[Layout, MergeContext]:
        """What becomes of the model's tensors, and the context as aggregators see it: trained parameters only."""
        layout = context.layout or Layout.of(reference, buffers, context.tied)
        names = [name for name in layout.trained if reference[name].is_complex()]
        if names:
            self.check_complex(names)
        if context.base is None:
            return layout, replace(context, known={})
        known = {name: context.base[name] for name in layout.still}  # every client has them
        base = as_pairs({name: context.base[name] for name in layout.trained})
        return layout, replace(context, base=base, known=known)

    def _completed(
        self,
        merged: State,
        own: State,
        intake: Intake,
        context: MergeContext,
        inner: MergeContext,
        memory: State,
        passed: Passed | None,
    ) -> MergeResult:
        """What follows the combination of clients: server steps, buffers, repair, refinements, averages, routing."""
        method, reference = type(self.aggregator).__name__, intake.reference
        next_memory = with_prefix("aggregator", own)
        if self.edits:
            next_memory |= remembered(self.edits, merged, inner, memory)
        for i, step in enumerate(self.server_steps):
            if inner.base is None:
                raise InvalidOption(f"{type(step).__name__} steps from the model all clients started from: pass base=.")
            step.check_widths(merged, inner.base, method)
            before = inner.base, bounded_state(merged, method)
            merged, own = step.step(*before, prefixed(f"step{i}", memory))
            check_step(merged, before, type(step).__name__)
            next_memory |= with_prefix(f"step{i}", own)
        frozen = {**intake.still, **({} if intake.unmoved is None else intake.unmoved.tensors)}
        if self.aggregator.moves_base:
            frozen = {name: tensor for name, tensor in frozen.items() if name not in merged}
        merged = bounded_state(from_pairs(merged, reference), method, reference)
        state = cast_like({**merged, **intake.buffers.finish(context.base), **frozen}, reference)
        _tie(state, context)
        if isinstance(self.aggregator, Aligning) and len(intake.accepted) > 1 and self.repair != "none":
            norms = self.batch_norm not in ("recalibrate", "local")
            norms = norms and not any(one.measures_norms for one in self.refinements)
            if intake.rescale is not None or (norms and any(map(is_norm_statistic, state))):
                repair_matched(state, context, method, intake.rescale, norms=norms, frozen=frozen)
        found = None
        if self.refinements:
            found = refined(self, state, frozen, intake, context, inner, memory, passed)
            state = found.state
            _tie(state, context)
        if self.trajectories:
            state, kept = averaged(self, state, intake, context, memory)
            next_memory |= kept
            _tie(state, context)
        if isinstance(self.aggregator, Routed) and passed is not None:
            next_memory |= routing_memory(self.aggregator, state, passed.kept, inner)
        result = MergeResult(
            {name: state[name] for name in reference if name in state},
            next_memory,
            tuple(sorted(intake.accepted)),
            tuple(intake.dropped),
        )
        if found is None:
            return result
        refused = tuple(one for exchange in found.exchanges for one in exchange.refused)
        return replace(result, exchanges=found.exchanges, answers=found.answers, skipped=found.skipped, refused=refused)

    @property
    def folds(self) -> bool:
        """Whether sums over some of the clients may be taken apart from the others, by :meth:`fold`."""
        return isinstance(self.aggregator, Fold) and not any(edit.remembers for edit in self.edits)

    @property
    def _folding(self) -> Fold[Any]:
        if not isinstance(self.aggregator, Fold):
            raise InvalidOption(f"{type(self.aggregator).__name__} is no sum over clients: pass its updates to merge()")
        return self.aggregator

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
        # A client that sends a wider model must not end the round of a method whose parts cannot take it.
        settings["one_width"] = bool(self.edits or self.trajectories)
        folded = BufferFold(layout, self.batch_norm, context.base)
        rule = self.local_rule
        return Intake(self.aggregator, reference, folded, layout, context, statistics, rule, on_bad=on_bad, **settings)


def _wait(bad: BadUpdate) -> None:
    """Do nothing: a worker only notes bad updates, and whoever joins the workers' sums reports them."""


def _tie(state: dict[str, Tensor], context: MergeContext) -> None:
    """Give shared tensors their value under all their names."""
    state.update({alias: state[name] for alias, name in context.tied.items() if name in state})
