"""How a worker trains its share of the clients: through the stages of the client road, one by one or stacked.

A worker gets an order (the model, how to train, what to measure) and some clients. Stacked clients train in one call.
Where the method is a sum over clients, the worker adds up its share and returns one sum instead of many models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Literal

import torch
from flwr.app import RecordDict

from fedmerge.clients.client import Client, receive
from fedmerge.clients.group import Group
from fedmerge.clients.road import AFTER_TRAINING, TOGETHER, enter, metrics_of, run
from fedmerge.errors import CannotStack, FedMergeError
from fedmerge.simulation.workers.flower_task import FAILURES, FIRST_NODE, failure_reason
from fedmerge.state import State
from fedmerge.statistics.sending.compression import decode
from fedmerge.strategies.order import Answer, Order, Trained
from fedmerge.training import EngineChoice, Participant, choose_engine
from fedmerge.training.engine import has_stacked_loss
from fedmerge.update import ClientUpdate, StackedUpdates
from fedmerge.wire.flower_records import STEPS_KEY
from fedmerge.wire.keys import ERROR_KEY
from fedmerge.wire.record_values import to_arrays

__all__ = ["TRIED", "Engine", "answer", "choose"]

log = logging.getLogger("fedmerge")

Engine = Literal["auto", "serial", "stacked"]

TRIED = 8
"""How many clients train twice, by either engine, when :func:`choose` measures which is faster."""
_BLOCK_BYTES = 256 << 20  # the most memory for models that are stacked at a time
_BLOCK = 512  # the most clients at a time: larger stacks are no faster


def answer(
    client: Client,
    order: Order,
    nodes: Sequence[int],
    total: int,
    engine: Literal["serial", "stacked"],
    kept: Mapping[int, RecordDict] | None = None,
) -> Answer:
    """Train the clients on `nodes`; add their models up where the method is a sum.

    Parameters
    ----------
    client
        What all clients of this process have in common: model, data, training.
    order
        The model, how to train it, and what to measure.
    nodes
        This worker's share of the order's nodes, ascending.
    total
        Number of known clients.
    engine
        Whether clients train one by one or stacked.
    kept
        By node, what a client keeps between rounds, where the order asks for that.

    Returns
    -------
    Answer
        The sum or the updates. Clients that failed are named in it; the others go on.

    Raises
    ------
    FedMergeError
        The order itself cannot be carried out, so that every client would fail.
    """
    try:
        share = _Share(client, order, total, kept or {})
    except FedMergeError:  # the order is at fault, not a client
        raise
    except FAILURES as problem:  # the user's model_fn or data_fn is at fault, and every client runs it
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
    """Measure with the first few clients whether they train faster one by one or stacked."""
    try:
        share = _Share(client, order, total, {})
        if not share.alike:
            return EngineChoice("serial", "clients start from tensors of their own")
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
        # Training one by one meets the same problem, and then the error names the client.
        return EngineChoice("serial", f"the trial failed: {problem}")


class _Share:
    """A worker's share of an order. The methods are generators: `result` fills up while their blocks are read."""

    def __init__(self, client: Client, order: Order, total: int, kept: Mapping[int, RecordDict]) -> None:
        self.result = Answer(kept=dict(kept))
        client = client.told(order.config)
        self._client, self._order, self._total, self._kept = client, order, total, kept
        self.received = receive(client, order.content, order.context.base or order.context.required_base("a cohort"))
        whole = self.received.completed(self.received.state)
        self.received = replace(self.received, state=whole)
        self._completes = self.received.parts is not None and self.received.parts.completes
        self.module = client.fitted(whole)  # a model that does not fit fails here, once for all clients

    @property
    def alike(self) -> bool:
        """Whether all clients start from the model sent, but for a personal part and batch norms of their own."""
        told = self.received.told
        return not told.stage and not self._client.starts_apart(told)

    def entered(self, nodes: Sequence[int]) -> Iterator[Group]:
        """The clients with their data, ready to train. Clients whose data cannot be loaded are noted as failed.

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
        """Send the clients through all stages one by one."""
        for group in self.entered(nodes):
            yield from self._alone(group)

    def stacked(self, nodes: Sequence[int]) -> Iterator[StackedUpdates]:
        """Train blocks of clients in one call each. Where a call fails, its clients train one by one, so that the
        client at fault can be named."""
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
        """Train a block in one call; None if it cannot train so, or fails."""
        task = self._client.task
        if len(group) == 1:
            return None
        try:
            if task is not None and not has_stacked_loss(task, _participants(group)):
                raise CannotStack(f"clients of {task} train one by one")
            together = run(self._client, group, TOGETHER)
        except FAILURES as problem:
            if isinstance(problem, CannotStack) and group.order.told.round <= 1:  # later rounds have the same reason
                log.warning("%s", problem)
            return None
        self.result.together += len(together)
        return together

    def _alone(self, group: Group) -> Iterator[StackedUpdates]:
        return self._tried(group, lambda single: run(self._client, single))

    def _tried(self, group: Group, stages: Callable[[Group], Group]) -> Iterator[StackedUpdates]:
        """What a group sends after these stages; nothing if they fail."""
        try:
            finished = stages(group)
        except FAILURES as problem:
            for number in group.clients:
                self._fail(number + FIRST_NODE, problem)
            return
        yield self._sent(finished)

    def _apart(self, group: Group) -> Iterator[Group]:
        """Divide a trained stack for the stages after training.

        Clients that measure or keep something, or whose reply is damaged on purpose, go on alone. Neighbours without
        any of that go on together.
        """
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
        """What a group sends, in the form that is merged. Notes what each client reports, and the bytes."""
        states = group.states or {}
        if len(group) == 1 and not self._order.folds:  # a copy, for the next client trains in the same memory
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
            # As a message would: every number takes 8 bytes, and so do the client's number and, where it is sent,
            # the mark that the client adds frozen tensors itself.
            self.result.bytes_up += each + 8 * (len(facts) + 1 + self._completes)
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
    """Bytes that these tensors take in a message."""
    return sum(_array_bytes(tensor.shape, tensor.dtype) for tensor in state.values())


@lru_cache(maxsize=4096)
def _array_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return len(to_arrays({"": torch.empty(shape, dtype=dtype)})[""].data)
