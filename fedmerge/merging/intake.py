"""Take client updates in: check each one, drop the bad ones, keep the buffers, and hand the parameters on.

Updates come as a stream and are handed on one by one, so that one model is in memory at a time. Two things make an
update wait until all have come: methods that align neurons, and numbers that are suspiciously large, which only the
other clients' numbers can confirm (:mod:`fedmerge.checks.magnitudes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from fedmerge.adapters.low_rank_pairs import find_pairs
from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.aligning import Aligning
from fedmerge.checks.magnitudes import Outliers, Peaks, fine_rows, peaks_of_rows
from fedmerge.checks.tensor_checks import Unmoved, equal_in_all
from fedmerge.checks.validation import LEAST_WEIGHT, MOST_EXAMPLES, check_held, checked_update, without_still
from fedmerge.errors import BadUpdate, CannotMatch, NoUsableUpdates
from fedmerge.layout import Layout
from fedmerge.matching.widths import check_widths
from fedmerge.merging.buffers import BufferFold
from fedmerge.merging.filled_updates import copied, filled_up
from fedmerge.merging.repair import Rescale
from fedmerge.merging.result import Partial
from fedmerge.merging.statistics_reader import StatisticsReader
from fedmerge.state import LARGEST, State, as_pairs, as_rows, is_norm_statistic
from fedmerge.training.rules.local_rule import LocalRule
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

__all__ = ["Intake"]


class Intake:
    """Checks the updates of one merge; remembers who was accepted, who was dropped and why, and the buffers."""

    def __init__(
        self,
        aggregator: Aggregator,
        reference: State,
        buffers: BufferFold,
        layout: Layout,
        context: MergeContext,
        statistics: StatisticsReader | None,
        rule: LocalRule | None,
        *,
        on_bad: Callable[[BadUpdate], None],
        rescaled: bool,
        comparing: bool = True,
        keeping: bool = False,
        one_width: bool = False,
    ) -> None:
        self._aggregator, self._context, self._on_bad = aggregator, context, on_bad
        self._statistics = statistics
        self._one_width = one_width
        self.reference, self.layout, self.buffers = reference, layout, buffers
        self._expected = layout.travelling(reference)  # names, shapes and types that an update must have
        held = () if rule is None or context.base is None else rule.held(layout.trained, context.round)
        self._held = {name: reference[name] for name in held}
        self.still: dict[str, Tensor] = {n: t for n, t in reference.items() if n in layout.still}
        """Tensors that do not travel: every update gets them from here."""
        rescaled = rescaled and isinstance(aggregator, Aligning)
        self.rescale = Rescale(context.inputs(type(aggregator).__name__)) if rescaled else None
        self._masks = frozenset(name for name in layout.float_buffers if not is_norm_statistic(name))
        start = Peaks() if context.base is None else Peaks.of(layout.travelling(context.base), self._masks)
        self.outliers = Outliers(start, comparing)
        followed = context.frozen - layout.still
        self.unmoved = Unmoved(followed) if followed else None
        self.accepted: list[int] = []
        self.told: dict[int, float] = {}
        """By client, the number of examples that it claims to have trained on."""
        self.dropped: list[BadUpdate] = []
        self.moved: dict[int, State] | None = {} if keeping else None
        """By client, its whole model after alignment, where alignment moved neurons; None unless asked to keep them."""

    def read(self, updates: Iterable[ClientUpdate | BadUpdate], at_least: int) -> Iterator[ClientUpdate]:
        """Yield the parameters of good updates, with their neurons in one order if the method aligns them.

        Raises
        ------
        NoUsableUpdates
            At the end of the stream, where fewer than `at_least` were good.
        """
        aggregator = self._aggregator
        checked = self._good(updates, at_least)
        ready: Iterable[ClientUpdate | BadUpdate] = checked
        before: dict[int, State] = {}
        if isinstance(aggregator, Aligning):
            # Sorted again, for suspicious updates come last.
            collected = sorted(checked, key=lambda update: update.client)
            before = {update.client: update.state for update in collected}
            ready = self._aligned(aggregator, collected, at_least)
        for update in ready:
            if isinstance(update, BadUpdate):
                self._drop_accepted([update], at_least)
                continue
            self.told[update.client] = update.weight
            if self.moved is not None and update.state is not before.get(update.client, update.state):
                self.moved[update.client] = update.state
            if self.rescale is not None:
                module = self._context.module(update.state, type(aggregator).__name__)
                self.rescale.add(module, update.weight)
            yield self._split(update)

    def late(self) -> Iterator[ClientUpdate]:
        """Yield suspicious updates that the finished sum lacks and the other clients' numbers confirm."""
        for update in self._decided():
            yield self._split(update)

    def _split(self, update: ClientUpdate) -> ClientUpdate:
        """Keep an update's buffers and return it with its parameters only."""
        if update.weight > 0:  # what is subtracted has no part in means of statistics, nor in counts
            self.buffers.add(update.state, update.weight)
        if self.unmoved is not None:
            self.unmoved.add(update.state)
        return replace(update, state=self._parameters(update.state))

    def _aligned(
        self, aggregator: Aligning, updates: list[ClientUpdate], at_least: int
    ) -> Iterator[ClientUpdate | BadUpdate]:
        """Updates with their neurons in one order; one that cannot be matched is dropped, and matching starts again."""
        while True:
            frozen = self._context.frozen and equal_in_all([one.state for one in updates], self._context.frozen)
            aligned = iter(aggregator.align(updates, replace(self._context, frozen=frozen)))
            try:
                first = next(aligned)  # a method yields nobody before all are matched, so errors come here
            except CannotMatch as mismatch:
                self._drop_accepted(mismatch.dropped, at_least)
                updates = [update for update in updates if update.client in self.accepted]
                continue
            return chain([first], aligned)

    def _drop_accepted(self, unmatched: Sequence[BadUpdate], at_least: int) -> None:
        """Drop clients whose updates are good by themselves, but cannot be matched with the others'."""
        for bad in unmatched:
            self.accepted.remove(int(bad.client))
            self._drop(bad)
        self.check_number(max(at_least, 1))

    def read_stacked(self, block: StackedUpdates) -> StackedUpdates:
        """The good rows of a block of clients that trained stacked, parameters only; their buffers are kept."""
        states = {name: tensor.expand(len(block), *tensor.shape) for name, tensor in self._held.items()}
        states |= self.layout.travelling(block.states)
        block = replace(block, states=_of_types(states, self._expected))
        suspect = self._suspect(block)
        if suspect or self._statistics is not None:
            block = self._selected(block, suspect)
        if not block.clients:
            return block
        self.buffers.add_stacked(block.states, block.weights)
        if self.unmoved is not None:
            self.unmoved.add_stacked(block.states)
        self.accepted += block.clients
        return replace(block, states=self._parameters(block.states))

    def _suspect(self, block: StackedUpdates) -> set[int]:
        """Rows that need a check of their own, found in one pass over the block; the peaks of the others are noted."""
        every_row, want = set(range(len(block.clients))), self._expected
        if {n: t.shape[1:] for n, t in block.states.items()} != {n: t.shape for n, t in want.items()}:
            return every_row
        if any(tensor.dtype != want[name].dtype for name, tensor in block.states.items()):
            return every_row
        base = self._context.base or {}
        fine = [fine_rows(name, t, self._masks, base.get(name)) for name, t in block.states.items()]
        fine += [~as_rows(t).isnan().any(1) for n, t in block.states.items() if n in self._masks]
        sound = torch.stack([rows.cpu() for rows in fine]).all(0).tolist()
        suspect = set()
        for k, (peaks, weight) in enumerate(zip(peaks_of_rows(block.states, self._masks), block.weights, strict=True)):
            usable = sound[k] and all(size <= LARGEST for size in peaks) and LEAST_WEIGHT <= weight <= MOST_EXAMPLES
            if not usable or self.outliers.leaps(peaks):
                suspect.add(k)
            else:
                self.outliers.seen.append(peaks)
        return suspect

    def _selected(self, block: StackedUpdates, suspect: set[int]) -> StackedUpdates:
        """The block without bad rows and without suspicious ones, which wait; its statistics are parsed."""
        kept, statistics = [], []
        for k, update in enumerate(block):
            try:
                if k in suspect:
                    checked, peaks = self._checked(update)
                    if self.outliers.holds(replace(checked, state=copied(checked.state)), peaks):
                        continue
                else:
                    checked = self._measured(update)
            except BadUpdate as bad:
                self._drop(bad)
                continue
            statistics.append(checked.statistics)
            kept.append(k)
        states = block.states
        if len(kept) < len(block):
            states = {name: stacked[kept] for name, stacked in states.items()}
        clients, weights = tuple(block.clients[k] for k in kept), tuple(block.weights[k] for k in kept)
        return StackedUpdates(clients, states, weights, tuple(statistics))

    def refuse(self, on_bad: Callable[[BadUpdate], None]) -> None:
        """Report bad updates that were dropped elsewhere, in a worker, and are known by now."""
        for bad in self.dropped:
            on_bad(bad)

    def take(self, partial: Partial) -> None:
        """Take over what workers folded."""
        self.buffers, self.unmoved = partial.buffers, partial.unmoved
        self.accepted, self.dropped, self.outliers = partial.accepted, partial.dropped, partial.outliers

    def check_number(self, at_least: int) -> None:
        """Make sure that enough clients were accepted.

        Raises
        ------
        NoUsableUpdates
            Fewer than `at_least` were good.
        """
        if len(self.accepted) < at_least:
            reasons = "; ".join(str(bad) for bad in self.dropped[:3]) or ("" if self.accepted else "no client replied")
            told = f" ({reasons})" if reasons else ""
            raise NoUsableUpdates(
                f"{len(self.accepted)} usable updates, at least {at_least} wanted{told}", self.dropped
            )

    def _good(self, updates: Iterable[ClientUpdate | BadUpdate], at_least: int) -> Iterator[ClientUpdate]:
        for update in updates:
            if isinstance(update, BadUpdate):
                self._drop(update)
                continue
            try:
                checked, peaks = self._checked(update)
            except BadUpdate as bad:
                self._drop(bad)
                continue
            if not self.outliers.holds(checked, peaks):
                self.accepted.append(update.client)
                yield checked
        yield from self._decided()
        self.check_number(at_least)

    def _decided(self) -> Iterator[ClientUpdate]:
        """Yield suspicious updates that the others confirm; drop the rest."""
        for update in self.outliers.decided():
            if isinstance(update, BadUpdate):
                self._drop(update)
                continue
            self.accepted.append(update.client)
            yield update

    def _checked(self, update: ClientUpdate) -> tuple[ClientUpdate, Peaks]:
        update = without_still(update, self.layout, self.still)
        if self._held or self._of_other_shape(update.state):  # a pair of smaller rank is one with slices of zeros
            pairs = find_pairs(self._expected, self._aggregator.pair_patterns, lenient=True)
            update = filled_up(update, pairs, self._expected, self._held)
        checked, peaks = checked_update(
            update,
            self._expected,
            same_shapes=self._one_width or not self._aggregator.may_change_width,
            masks=self._masks,
            start=self._context.base,
            tied=self._context.tied,
            signed=self._context.signed,
        )
        if self._held:
            check_held(checked, self._held)
        if self.still:
            checked = replace(checked, state={**self.still, **checked.state})
        other = [name for name, tensor in checked.state.items() if tensor.shape != self.reference[name].shape]
        if other:
            check_widths(checked, other, self.reference, self._context, type(self._aggregator).__name__)
        return self._measured(checked), peaks

    def _of_other_shape(self, state: State) -> bool:
        sent = [(state.get(name), want) for name, want in self._expected.items()] if isinstance(state, Mapping) else []
        return any(isinstance(tensor, Tensor) and tensor.shape != want.shape for tensor, want in sent)

    def _measured(self, update: ClientUpdate) -> ClientUpdate:
        """The update with its statistics parsed."""
        if self._statistics is None:
            return update
        return replace(update, statistics={**update.statistics, **self._statistics.read(update)})

    def _parameters(self, state: State) -> State:
        return as_pairs({name: state[name] for name in self.layout.trained})

    def _drop(self, bad: BadUpdate) -> None:
        self._on_bad(bad)
        self.dropped.append(bad)


def _of_types(states: State, reference: State) -> State:
    """Stacked tensors cast to the model's types, floating numbers only."""
    cast = dict(states)
    for name in reference.keys() & states.keys():
        if states[name].is_floating_point() and reference[name].is_floating_point():
            cast[name] = states[name].to(reference[name].dtype)
    return cast
