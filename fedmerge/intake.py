"""Takes client updates in: checks them, drops bad ones, keeps their buffers, hands parameters on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fedmerge.aggregators.aligning import Aligning
from fedmerge.aggregators.base import Aggregator
from fedmerge.buffer_checks import fine_rows
from fedmerge.buffers import BufferFold
from fedmerge.complex_pairs import as_pairs
from fedmerge.errors import BadUpdate, CannotMatch, NoUsableUpdates
from fedmerge.layout import Layout
from fedmerge.outliers import Outliers, Peaks, peaks_of_rows
from fedmerge.reading import StatisticsReader
from fedmerge.repair import Rescale
from fedmerge.state import LARGEST, State, as_rows, is_norm_statistic
from fedmerge.unmoved import Unmoved, equal_in_all
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates
from fedmerge.validation import LEAST_WEIGHT, MOST_EXAMPLES, checked_update, without_still
from fedmerge.widths import check_widths

__all__ = ["Intake", "Partial"]


@dataclass
class Partial:
    """The sum over some clients, with their buffers, and who they were."""

    total: Any
    buffers: BufferFold
    accepted: list[int]
    dropped: list[BadUpdate]
    unmoved: Unmoved = field(default_factory=Unmoved)
    outliers: Outliers = field(default_factory=Outliers)


class Intake:
    """Hands good updates on, parameters only, and keeps their buffers, names and the reasons of bad ones."""

    def __init__(
        self,
        aggregator: Aggregator,
        reference: State,
        buffers: BufferFold,
        layout: Layout,
        context: MergeContext,
        statistics: StatisticsReader,
        *,
        on_bad: Callable[[BadUpdate], None],
        rescaled: bool,
        comparing: bool = True,
        keeping: bool = False,
    ) -> None:
        self._aggregator, self._context, self._on_bad = aggregator, context, on_bad
        self._statistics = statistics
        self.reference, self.layout, self.buffers = reference, layout, buffers
        self._sent = layout.travelling(reference)  # what an update is to bring
        self.still: dict[str, Tensor] = {n: t for n, t in reference.items() if n in layout.still}
        """What no update brings, or at least not otherwise than it is here."""
        rescaled = rescaled and isinstance(aggregator, Aligning)
        self.rescale = Rescale(context.inputs(type(aggregator).__name__)) if rescaled else None
        self._masks = frozenset(name for name in layout.float_buffers if not is_norm_statistic(name))
        start = Peaks() if context.base is None else Peaks.of(layout.travelling(context.base), self._masks)
        self.outliers = Outliers(start, comparing)
        self.unmoved = Unmoved(context.frozen - layout.still)
        self.accepted: list[int] = []
        self.told: dict[int, float] = {}
        """By client, how many examples it says that it trained on."""
        self.dropped: list[BadUpdate] = []
        self.moved: dict[int, State] | None = {} if keeping else None
        """By client, all of its model once its neurons are in the common order, where they are moved and it is kept."""

    def read(self, updates: Iterable[ClientUpdate | BadUpdate], at_least: int) -> Iterator[ClientUpdate]:
        """Good updates of a stream, aligned where the method aligns.

        Raises
        ------
        NoUsableUpdates
            At the end of the stream, where fewer than `at_least` were good.
        """
        aggregator = self._aggregator
        fine = self._good(updates, at_least)
        good: Iterable[ClientUpdate | BadUpdate] = fine
        given: dict[int, State] = {}
        if isinstance(aggregator, Aligning):
            held = sorted(fine, key=lambda update: update.client)  # some had to wait for all others
            given = {update.client: update.state for update in held}
            good = self._aligned(aggregator, held, at_least)
        for update in good:
            if isinstance(update, BadUpdate):
                self._leave_out([update], at_least)
                continue
            self.told[update.client] = update.weight
            if self.moved is not None and update.state is not given.get(update.client, update.state):
                self.moved[update.client] = update.state
            if self.rescale is not None:
                module = self._context.module(update.state, type(aggregator).__name__)
                self.rescale.add(module, update.weight)
            yield self._split(update)

    def late(self) -> Iterator[ClientUpdate]:
        """Those of a finished sum whose numbers had to wait for all others', where they are no outliers."""
        for update in self._decided():
            yield self._split(update)

    def _split(self, update: ClientUpdate) -> ClientUpdate:
        """The parameters of an update, once its buffers are kept."""
        self.buffers.add(update.state, update.weight)
        self.unmoved.add(update.state)
        return replace(update, state=self._parameters(update.state))

    def _aligned(
        self, aggregator: Aligning, held: list[ClientUpdate], at_least: int
    ) -> Iterator[ClientUpdate | BadUpdate]:
        """Updates in one order of neurons, without those that cannot be brought into it."""
        while True:
            frozen = equal_in_all([update.state for update in held], self._context.frozen)
            aligned = iter(aggregator.align(held, replace(self._context, frozen=frozen)))
            try:
                first = next(aligned)  # nobody is yielded before all are matched
            except CannotMatch as found:
                self._leave_out(found.dropped, at_least)
                held = [update for update in held if update.client in self.accepted]
                continue
            return chain([first], aligned)

    def _leave_out(self, found: Sequence[BadUpdate], at_least: int) -> None:
        """Drop clients that were good one by one, but cannot be brought into the others' order."""
        for bad in found:
            self.accepted.remove(int(bad.client))
            self._drop(bad)
        self.check_number(max(at_least, 1))

    def read_stacked(self, block: StackedUpdates) -> StackedUpdates:
        """The good ones of clients that trained stacked."""
        block = replace(block, states=_of_types(self.layout.travelling(block.states), self._sent))
        suspect = self._suspect(block)
        if suspect or self._aggregator.needs:
            block = self._selected(block, suspect)
        if not block.clients:
            return block
        self.buffers.add_stacked(block.states, block.weights)
        self.unmoved.add_stacked(block.states)
        self.accepted += block.clients
        return replace(block, states=self._parameters(block.states))

    def _suspect(self, block: StackedUpdates) -> set[int]:
        """Rows that need a closer look, found in one pass; the others' peaks are noted."""
        everybody, want = set(range(len(block))), self._sent
        if {n: t.shape[1:] for n, t in block.states.items()} != {n: t.shape for n, t in want.items()}:
            return everybody
        if any(tensor.dtype != want[name].dtype for name, tensor in block.states.items()):
            return everybody
        base = self._context.base or {}
        fine = [fine_rows(name, t, self._masks, base.get(name)) for name, t in block.states.items()]
        fine += [~as_rows(t).isnan().any(1) for n, t in block.states.items() if n in self._masks]
        sound = torch.stack([one.cpu() for one in fine]).all(0).tolist()
        suspect = set()
        for k, (peaks, weight) in enumerate(zip(peaks_of_rows(block.states, self._masks), block.weights, strict=True)):
            usable = sound[k] and all(size <= LARGEST for size in peaks) and LEAST_WEIGHT <= weight <= MOST_EXAMPLES
            if not usable or self.outliers.leaps(peaks):
                suspect.add(k)
            else:
                self.outliers.seen.append(peaks)
        return suspect

    def _selected(self, block: StackedUpdates, suspect: set[int]) -> StackedUpdates:
        """The block without bad updates and those that have to wait, its statistics parsed."""
        kept, statistics = [], []
        for k, update in enumerate(block):
            try:
                if k in suspect:
                    checked, peaks = self._checked(update)
                    if self.outliers.holds(replace(checked, state=_copied(checked.state)), peaks):
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
        """Tell of the bad ones now, where that had to wait."""
        for bad in self.dropped:
            on_bad(bad)

    def take(self, partial: Partial) -> None:
        """Take over what has been folded elsewhere."""
        self.buffers, self.unmoved = partial.buffers, partial.unmoved
        self.accepted, self.dropped, self.outliers = partial.accepted, partial.dropped, partial.outliers

    def check_number(self, at_least: int) -> None:
        """Make sure that there is enough to merge.

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
        """Those whose numbers had to wait for all others', where they are no outliers."""
        for update in self.outliers.decided():
            if isinstance(update, BadUpdate):
                self._drop(update)
                continue
            self.accepted.append(update.client)
            yield update

    def _checked(self, update: ClientUpdate) -> tuple[ClientUpdate, Peaks]:
        checked, peaks = checked_update(
            without_still(update, self.layout, self.still),
            self._sent,
            same_shapes=not self._aggregator.may_change_width,
            masks=self._masks,
            start=self._context.base,
            tied=self._context.tied,
        )
        if self.still:
            checked = replace(checked, state={**self.still, **checked.state})
        check_widths(checked, self.reference, self._context, type(self._aggregator).__name__)
        return self._measured(checked), peaks

    def _measured(self, update: ClientUpdate) -> ClientUpdate:
        """The update with its statistics parsed."""
        if not self._aggregator.needs:
            return update
        return replace(update, statistics={**update.statistics, **self._statistics.read(update)})

    def _parameters(self, state: State) -> State:
        return as_pairs({name: state[name] for name in self.layout.parameters})

    def _drop(self, bad: BadUpdate) -> None:
        self._on_bad(bad)
        self.dropped.append(bad)


def _of_types(states: State, reference: State) -> State:
    """Stacked tensors in the model's types, where both are floating numbers."""
    found = dict(states)
    for name in reference.keys() & states.keys():
        if states[name].is_floating_point() and reference[name].is_floating_point():
            found[name] = states[name].to(reference[name].dtype)
    return found


def _copied(state: State) -> State:
    """What outlives the block that its tensors are rows of."""
    return {name: tensor.clone() for name, tensor in state.items()}
