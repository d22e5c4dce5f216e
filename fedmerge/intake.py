"""Takes client updates in: checks them, drops bad ones, keeps their buffers, hands parameters on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedmerge.aggregators.aligning import Aligning
from fedmerge.aggregators.base import Aggregator
from fedmerge.buffers import BufferFold
from fedmerge.complex_pairs import as_pairs
from fedmerge.errors import BadUpdate, InvalidOption, ModelError, NoUsableUpdates
from fedmerge.repair import Rescale
from fedmerge.state import Layout, State, as_rows
from fedmerge.statistics import Statistic
from fedmerge.statistics.compression import decode
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates
from fedmerge.validation import check_update

__all__ = ["Intake", "Partial"]

WIDEST = 32
"""How many times as wide as the model sent a client's may be."""


@dataclass
class Partial:
    """The sum over some clients, with their buffers, and who they were."""

    total: Any
    buffers: BufferFold
    accepted: list[int]
    dropped: list[BadUpdate]


class Intake:
    """Hands good updates on, parameters only, and keeps their buffers, names and the reasons of bad ones."""

    def __init__(
        self,
        aggregator: Aggregator,
        reference: State,
        buffers: BufferFold,
        layout: Layout,
        context: MergeContext,
        *,
        on_bad: Callable[[BadUpdate], None],
        rescaled: bool,
        trusting: bool = False,
        keeping: bool = False,
    ) -> None:
        self._aggregator, self._context, self._on_bad = aggregator, context, on_bad
        self.reference, self.layout, self.buffers = reference, layout, buffers
        rescaled = rescaled and isinstance(aggregator, Aligning)
        self.rescale = Rescale(context.inputs(type(aggregator).__name__)) if rescaled else None
        self._unread = frozenset(layout.parameters if trusting else ())
        self.accepted: list[int] = []
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
        good: Iterable[ClientUpdate] = self._good(updates, at_least)
        given: dict[int, State] = {}
        if isinstance(aggregator, Aligning):
            held = list(good)
            given = {update.client: update.state for update in held}
            good = aggregator.align(held, self._context)
        for update in good:
            self.buffers.add(update.state, update.weight)
            if self.moved is not None and update.state is not given.get(update.client, update.state):
                self.moved[update.client] = update.state
            if self.rescale is not None:
                module = self._context.module(update.state, type(aggregator).__name__)
                self.rescale.add(module, update.weight)
            yield replace(update, state=self._parameters(update.state))

    def read_stacked(self, block: StackedUpdates) -> StackedUpdates:
        """The good ones of clients that trained stacked."""
        suspect = self._suspect(block)
        if suspect or self._aggregator.needs:
            block = self._selected(block, suspect)
        if not block.clients:
            return block
        self.buffers.add_stacked(block.states, block.weights)
        self.accepted += block.clients
        return replace(block, states=self._parameters(block.states))

    def _suspect(self, block: StackedUpdates) -> set[int]:
        """Rows that need a closer look, found in one pass: shapes, weights, or not finite in sum."""
        shapes = {name: stacked.shape[1:] for name, stacked in block.states.items()}
        if shapes != {name: tensor.shape for name, tensor in self.reference.items()}:
            return set(range(len(block)))
        sums = [as_rows(t).sum(1) for t in block.states.values() if t.is_floating_point() or t.is_complex()]
        finite = torch.stack([total.isfinite() for total in sums]).all(0).tolist()
        return {k for k, weight in enumerate(block.weights) if not (finite[k] and weight > 0)}

    def _selected(self, block: StackedUpdates, suspect: set[int]) -> StackedUpdates:
        """The block without bad updates, its statistics parsed."""
        kept, statistics = [], []
        for k, update in enumerate(block):
            try:
                statistics.append(self._checked(update, closely=k in suspect).statistics)
            except BadUpdate as bad:
                self._drop(bad)
                continue
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
        self.buffers = partial.buffers
        self.accepted, self.dropped = partial.accepted, partial.dropped

    def check_number(self, at_least: int) -> None:
        """Make sure that there is enough to merge.

        Raises
        ------
        NoUsableUpdates
            Fewer than `at_least` were good.
        """
        if len(self.accepted) < at_least:
            reasons = "; ".join(str(bad) for bad in self.dropped[:3]) or "no client replied"
            raise NoUsableUpdates(
                f"{len(self.accepted)} usable updates, at least {at_least} wanted ({reasons})", self.dropped
            )

    def _good(self, updates: Iterable[ClientUpdate | BadUpdate], at_least: int) -> Iterator[ClientUpdate]:
        for update in updates:
            if isinstance(update, BadUpdate):
                self._drop(update)
                continue
            try:
                checked = self._checked(update)
            except BadUpdate as bad:
                self._drop(bad)
                continue
            self.accepted.append(update.client)
            yield checked
        self.check_number(at_least)

    def _checked(self, update: ClientUpdate, *, closely: bool = True) -> ClientUpdate:
        aggregator = self._aggregator
        if closely:
            check_update(update, self.reference, same_shapes=not aggregator.may_change_width, unread=self._unread)
            self._check_widths(update)
        if not aggregator.needs:
            return update
        parsed = {statistic.name: _parsed(update, statistic) for statistic in aggregator.needs}
        return replace(update, statistics={**update.statistics, **parsed})

    def _check_widths(self, update: ClientUpdate) -> None:
        """Other widths than the reference's are fine where they make a model that runs."""
        other = [name for name, tensor in update.state.items() if tensor.shape != self.reference[name].shape]
        if not other:
            return
        for name in other:  # matching takes memory by the square of a width
            have, base = update.state[name].shape, self.reference[name].shape
            if len(have) != len(base) or any(n > WIDEST * max(1, m) for n, m in zip(have, base, strict=True)):
                raise BadUpdate(
                    update.client,
                    f"tensor {name!r} has shape {list(have)}, more than {WIDEST} times the base's {list(base)}",
                    "Start from a model of about the clients' widths.",
                )
        try:
            self._context.symmetries(update.state, type(self._aggregator).__name__)
        except (ModelError, RuntimeError, TypeError, ValueError) as error:
            shapes = ", ".join(f"{name!r} {list(update.state[name].shape)}" for name in other[:3])
            raise BadUpdate(
                update.client, f"its shapes make no model that runs: {shapes}", "Send widths that fit each other."
            ) from error

    def _parameters(self, state: State) -> State:
        return as_pairs({name: state[name] for name in self.layout.parameters})

    def _drop(self, bad: BadUpdate) -> None:
        self._on_bad(bad)
        self.dropped.append(bad)


def _parsed(update: ClientUpdate, statistic: Statistic) -> State:
    sent = update.statistic(statistic.name)
    try:
        parsed = statistic.parse(decode(sent, lambda shapes: statistic.check_shapes(shapes, update.state)))
        statistic.check(parsed, update.state)
    # What a client measured may be any tensors: those that torch cannot even compare are as bad as the rest.
    except (InvalidOption, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BadUpdate(update.client, str(error), "Mend what the client measures.") from error
    return parsed
