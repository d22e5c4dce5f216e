"""What a worker does with its share of an order: send clients down the road, one by one or stacked, and fold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Literal

import torch
from flwr.app import RecordDict

from fedmerge.clients.client import Client
from fedmerge.clients.group import Group
from fedmerge.clients.road import AFTER_TRAINING, TOGETHER, enter, metrics_of, receive, run
from fedmerge.errors import CannotStack, FedMergeError
from fedmerge.simulation.workers.flower_task import FAILURES, FIRST_NODE, failure_reason
from fedmerge.state import State
from fedmerge.statistics.sending.compression import decode
from fedmerge.strategies.order import Answer, Order, Trained
from fedmerge.training import EngineChoice, Participant, choose_engine
from fedmerge.training.engine import has_stacked_loss
from fedmerge.update import ClientUpdate, StackedUpdates
from fedmerge.wire.flower_records import STEPS_KEY, to_arrays
from fedmerge.wire.keys import ERROR_KEY

__all__ = ["TRIED", "Engine", "answer", "choose"]

log = logging.getLogger("fedmerge")

Engine = Literal["auto", "serial", "stacked"]

TRIED = 8
"""Clients that a measurement of engines takes."""
_BLOCK_BYTES = 256 << 20  # of models that are stacked before they are folded
_BLOCK = 512  # clients: beyond, stacking saves nothing


def answer(
    client: Client,
    order: Order,
    nodes: Sequence[int],
    total: int,
    engine: Literal["serial", "stacked"],
    kept: Mapping[int, RecordDict] | None = None,
) -> Answer:
    """Train the clients on `nodes`, and fold them where the method is a sum.

    Parameters
    ----------
    client
        The client side that would answer messages.
    order
        What to do.
    nodes
        This worker's share of the order's nodes, ascending.
    total
        Number of known clients.
    engine
        How to train.
    kept
        What clients remember, by node, where the order has them keep anything.

    Returns
    -------
    Answer
        A client that fails is named in it and stops nobody else.

    Raises
    ------
    FedMergeError
        No client could do what the order says.
    """
    try:
        share = _Share(client, order, total, kept or {})
    except FedMergeError:  # of the order, and so of all clients
        raise
    except FAILURES as problem:  # of code that every client runs
        return Answer(failures=[(node, failure_reason(node - FIRST_NODE, problem)) for node in nodes])
    blocks = share.stacked(nodes) if engine == "stacked" and share.alike else share.serial(nodes)
    if order.folds:
        share.result.partial = order.pipeline.fold(blocks, order.context, order.buffers)
    else:
        updates: list[ClientUpdate] = []
        for block in blocks:
            updates += block
        share.result.updates = updates
    return share.result


def choose(client: Client, order: Order, nodes: Sequence[int], total: int) -> EngineChoice:
    """Measure on the first clients which engine is faster."""
    try:
        share = _Share(client, order, total, {})
        if not share.alike:
            return EngineChoice("serial", "clients start from different models")
        groups = list(islice(share.entered(nodes), TRIED))
        if not groups:
            return EngineChoice("serial", "no client has data")
        participants = _participants(Group.joined(groups))
        if not has_stacked_loss(client.task, participants):
            return EngineChoice("serial", f"clients of {client.task} train one by one")
        told = share.received.told
        return choose_engine(
            share.module, participants, told.training, seed=told.seed, round=told.round, task=client.task
        )
    except FAILURES as problem:
        # Whatever it is, it is told with the client's name where clients train one by one.
        return EngineChoice("serial", f"the trial failed: {problem}")


class _Share:
    """One share of an order; `result` fills while blocks are read."""

    def __init__(self, client: Client, order: Order, total: int, kept: Mapping[int, RecordDict]) -> None:
        self.result = Answer(kept=dict(kept))
        self._client, self._order, self._total, self._kept = client, order, total, kept
        self.received = receive(client, order.content, order.context.required_base("a cohort"))
        whole = self.received.parts.received(self.received.state, None)
        self.received = replace(self.received, state=whole)
        self.module = client.fitted(whole)  # what does not fit is everybody's trouble

    @property
    def alike(self) -> bool:
        """Whether all clients start from the same tensors."""
        told = self.received.told
        return not self._client.starts_apart(told) and not told.keeps_buffers

    def entered(self, nodes: Sequence[int]) -> Iterator[Group]:
        """Clients that have taken up the order; one whose data cannot be had has failed.

        Raises
        ------
        ModelError
            The model sent has other outputs than the clients' own, or does not take their inputs.
        """
        checked, keeps = False, self._order.keeps
        for node in nodes:
            try:
                group = enter(
                    self._client, self.received, node - FIRST_NODE, self._total,
                    self._kept.get(node, RecordDict()) if keeps else None, node,
                )  # fmt: skip
            except FAILURES as problem:
                self._fail(node, problem)
                continue
            if not checked:
                self._client.check_outputs(self.module, group.data[0].train)
                checked = True
            yield group

    def serial(self, nodes: Sequence[int]) -> Iterator[StackedUpdates]:
        """One client after the other."""
        for group in self.entered(nodes):
            yield from self._alone(group)

    def stacked(self, nodes: Sequence[int]) -> Iterator[StackedUpdates]:
        """Many clients in one call; one after the other where that fails, so that the culprit is named."""
        each = sum(tensor.nbytes for tensor in self.received.state.values())
        size = max(1, min(_BLOCK, _BLOCK_BYTES // max(1, each)))
        groups = self.entered(nodes)
        while block := list(islice(groups, size)):
            together = self._together(Group.joined(block))
            if together is None:
                for group in block:
                    yield from self._alone(group)
                continue
            for piece in self._apart(together):
                yield from self._tried(piece, lambda group: run(self._client, group, AFTER_TRAINING))

    def _together(self, group: Group) -> Group | None:
        """A block that has trained in one call; None where that cannot be, or fails."""
        task = self._client.task
        if len(group) == 1:
            return None
        try:
            if task is not None and not has_stacked_loss(task, _participants(group)):
                raise CannotStack(f"clients of {task} train one by one")
            together = run(self._client, group, TOGETHER)
        except FAILURES as problem:
            if isinstance(problem, CannotStack) and group.order.told.round <= 1:  # later it has the same reason
                log.warning("%s", problem)
            return None
        self.result.together += len(together)
        return together

    def _alone(self, group: Group) -> Iterator[StackedUpdates]:
        return self._tried(group, lambda one: run(self._client, one))

    def _tried(self, group: Group, go: Callable[[Group], Group]) -> Iterator[StackedUpdates]:
        """What a group sends that goes some way; nothing where it fails."""
        try:
            gone = go(group)
        except FAILURES as problem:
            for number in group.clients:
                self._fail(number + FIRST_NODE, problem)
            return
        yield self._sent(gone)

    def _apart(self, group: Group) -> Iterator[Group]:
        """Clients of a stack as they go on: each alone that measures, keeps or breaks something, others together."""
        mishaps, told = self._client.mishaps, group.order.told
        alone = told.measures or bool(group.kept)
        start = 0
        for row, number in enumerate(group.clients):
            if alone or (mishaps is not None and not mishaps.sends_well(number, told.round)):
                if start < row:
                    yield group.rows(start, row)
                yield group.rows(row, row + 1)
                start = row + 1
        if start < len(group):
            yield group.rows(start, len(group))

    def _sent(self, group: Group) -> StackedUpdates:
        """What a group sends, as it is merged; facts and bytes are noted."""
        states = group.states or {}
        if len(group) == 1 and not self._order.folds:  # the next client trains in the same memory
            states = {name: tensor.clone() for name, tensor in states.items()}
        each = state_bytes(group.state())
        for row, number in enumerate(group.clients):
            facts = metrics_of(group, row)
            self.result.trained.append(
                Trained(
                    number,
                    number + FIRST_NODE,
                    facts["num-examples"],
                    facts.get("train_loss"),
                    int(facts[STEPS_KEY]),
                    facts.get(ERROR_KEY),
                )
            )
            # A message also has the client's number, and the word that it completes models where it does.
            self.result.bytes_up += each + 8 * (len(facts) + 1 + self.received.parts.completes)
        self.result.bytes_up += sum(state_bytes(value) for sent in group.statistics for value in sent.values())
        return StackedUpdates(
            group.clients,
            states,
            tuple(float(len(data)) for data in group.data),
            tuple({name: decode(value) for name, value in sent.items()} for sent in group.statistics),
        )

    def _fail(self, node: int, problem: BaseException) -> None:
        self.result.failures.append((node, failure_reason(node - FIRST_NODE, problem)))


def _participants(group: Group) -> list[Participant]:
    return [Participant(n, data.train) for n, data in zip(group.clients, group.data, strict=True)]


def state_bytes(state: State) -> int:
    """Bytes of these tensors in a message."""
    return sum(_array_bytes(tensor.shape, tensor.dtype) for tensor in state.values())


@lru_cache(maxsize=4096)
def _array_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return len(to_arrays({"": torch.empty(shape, dtype=dtype)})[""].data)
