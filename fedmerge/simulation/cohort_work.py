"""What a worker does with its share of a cohort: train the clients, measure, fold."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Literal

import torch
from torch import nn

from fedmerge.data.client_data import client_data
from fedmerge.errors import CannotStack, FedMergeError
from fedmerge.simulation.flower_task import FAILURES, FIRST_NODE, failure_reason
from fedmerge.state import State
from fedmerge.statistics.compression import decode
from fedmerge.strategies.client_side import ClientSide
from fedmerge.strategies.cohort_order import CohortAnswer, CohortOrder, Trained
from fedmerge.strategies.measure import measured
from fedmerge.strategies.wire import WITHHOLD_KEY, to_arrays
from fedmerge.training import EngineChoice, Participant, TrainingReport, choose_engine, train_cohort
from fedmerge.training.engine import has_stacked_loss
from fedmerge.training.local import batches_to_measure
from fedmerge.training.model_snapshot import ModelSnapshot
from fedmerge.update import StackedUpdates

__all__ = ["TRIED", "Engine", "answer", "choose"]

log = logging.getLogger("fedmerge")

Engine = Literal["auto", "serial", "stacked"]

TRIED = 8
"""Clients that a measurement of engines takes."""
_BLOCK_BYTES = 256 << 20  # of models that are stacked before they are folded
_BLOCK = 512  # clients: beyond, stacking saves nothing


def answer(
    side: ClientSide, order: CohortOrder, nodes: Sequence[int], total: int, engine: Literal["serial", "stacked"]
) -> CohortAnswer:
    """Train the clients on `nodes`, and fold them where the method is a sum.

    Parameters
    ----------
    side
        The client side that would answer messages.
    order
        What to do.
    nodes
        This worker's share of the order's nodes, ascending.
    total
        Number of known clients.
    engine
        How to train.

    Returns
    -------
    CohortAnswer
        One that fails is named in it and stops nobody else.

    Raises
    ------
    FedMergeError
        No client could do what the order says.
    """
    try:
        work = _Work(side, order, total)
    except FedMergeError:  # of the order, and so of all clients
        raise
    except FAILURES as problem:  # of code that every client runs
        return CohortAnswer(failures=[(node, failure_reason(node - FIRST_NODE, problem)) for node in nodes])
    blocks = work.stacked(nodes) if engine == "stacked" and not side.starts_apart(order.config) else work.serial(nodes)
    if order.folds:
        work.result.partial = order.pipeline.fold(blocks, order.context, order.buffers)
    else:
        for block in blocks:
            work.result.updates += block
    return work.result


def choose(side: ClientSide, order: CohortOrder, nodes: Sequence[int], total: int) -> EngineChoice:
    """Measure on the first clients which engine is faster."""
    try:
        work = _Work(side, order, total)
        participants = [one for _, one in islice(work.participants(nodes), TRIED)]
        if not participants:
            return EngineChoice("serial", "no client has data")
        if not has_stacked_loss(side.task, participants):
            return EngineChoice("serial", f"clients of {side.task} train one by one")
        return choose_engine(work.module, participants, work.settings, seed=work.seed, round=work.round)
    except FAILURES as problem:
        # Whatever it is, it is told with the client's name where clients train one by one.
        return EngineChoice("serial", f"the trial failed: {problem}")


class _Work:
    """One share of an order; `result` fills while blocks are read."""

    def __init__(self, side: ClientSide, order: CohortOrder, total: int) -> None:
        self.result = CohortAnswer()
        self._side, self._order, self._total = side, order, total
        self.settings, self.seed, self.round = side.settings(order.config)
        self._base = order.context.required_base("a cohort")
        self.module = side.resized(self._base)
        self._fresh = ModelSnapshot(self.module)

    def participants(self, nodes: Sequence[int]) -> Iterator[tuple[int, Participant]]:
        """The clients and their data; one whose data cannot be had has failed.

        Raises
        ------
        ModelError
            The model sent has other outputs than the clients' own, or does not take their inputs.
        """
        checked = False
        for node in nodes:
            client = node - FIRST_NODE
            try:
                if self._side.mishaps is not None:
                    self._side.mishaps.begin(client, self.round)
                data = client_data(self._side.data_fn, client, self._total)
                participant = Participant(client, data.train)
            except FAILURES as problem:
                self._fail(node, problem)
                continue
            if not checked:
                self._side.check_outputs(self.module, participant.data)
                checked = True
            yield node, participant

    def serial(self, nodes: Sequence[int]) -> Iterator[StackedUpdates]:
        """One client after the other."""
        for node, one in self.participants(nodes):
            yield from self._alone(node, one)

    def stacked(self, nodes: Sequence[int]) -> Iterator[StackedUpdates]:
        """Many clients in one call; one after the other where that fails, so that the culprit is named."""
        size = max(1, min(_BLOCK, _BLOCK_BYTES // max(1, sum(t.nbytes for t in self._base.values()))))
        clients = self.participants(nodes)
        while block := list(islice(clients, size)):
            together = self._together(block)
            if together is None:
                for node, one in block:
                    yield from self._alone(node, one)
            else:
                yield from self._measured(block, *together)

    def _together(self, block: list[tuple[int, Participant]]) -> tuple[State, list[TrainingReport]] | None:
        """What a block that trains in one call sends, before statistics; None where that cannot be, or fails."""
        participants = [one for _, one in block]
        if not has_stacked_loss(self._side.task, participants):
            return None
        try:
            done = train_cohort(self._loaded(self._base), participants, self.settings, seed=self.seed, round=self.round)
            return self._tampered(block, done.states), done.reports
        except FAILURES as problem:
            if isinstance(problem, CannotStack) and self.round <= 1:  # once for a run; it has the same reason later
                log.warning("%s", problem)
            return None

    def _alone(self, node: int, one: Participant) -> Iterator[StackedUpdates]:
        named = {"seed": self.seed, "client": one.client, "round": self.round}
        try:
            model = self._side.own_model(self._order.config, one.client) or self._loaded(self._base)
            report = self._side.fit(model, one.data, self.settings, **named)
            sent, error = self._statistics(model, one, report)
        except FAILURES as problem:
            self._fail(node, problem)
            return
        state = {name: tensor.detach().cpu()[None] for name, tensor in model.state_dict().items()}
        if not self._order.folds:  # the next client trains in the same memory
            state = {name: tensor.clone() for name, tensor in state.items()}
        yield from self._sent([(node, one)], state, [report], [sent], [error])

    def _tampered(self, block: list[tuple[int, Participant]], states: State) -> State:
        """What the clients of a block send of what they have trained."""
        tamper = self._side.tamper
        if tamper is None:
            return states
        names = [name for name, _ in self.module.named_parameters()]
        base = {name: self._base[name].to(states[name]) for name in names}
        sent = {name: states[name].clone() for name in names}
        for k, (_, one) in enumerate(block):
            trained = {name: states[name][k] for name in names}
            for name, tensor in tamper(trained, base, one.client, self.round).items():
                sent[name][k] = tensor
        return {**states, **sent}

    def _measured(
        self, block: list[tuple[int, Participant]], states: State, reports: list[TrainingReport]
    ) -> Iterator[StackedUpdates]:
        states = {name: tensor.cpu() for name, tensor in states.items()}
        if not self._order.pipeline.needs:
            yield from self._sent(block, states, reports, [{}] * len(block), [None] * len(block))
            return
        for k, ((node, one), report) in enumerate(zip(block, reports, strict=True)):
            state = {name: tensor[k : k + 1] for name, tensor in states.items()}
            try:
                model = self._loaded({name: tensor[0] for name, tensor in state.items()})
                sent, error = self._statistics(model, one, report)
            except FAILURES as problem:
                self._fail(node, problem)
                continue
            yield from self._sent([(node, one)], state, [report], [sent], [error])

    @torch.no_grad()
    def _loaded(self, state: State) -> nn.Module:
        """The module with the values of `state`, as good as new: nothing of one client is left for the next."""
        self._fresh.restore(parameters=False)
        for name, tensor in self.module.state_dict().items():
            tensor.copy_(state[name])
        return self.module

    def _statistics(
        self, model: nn.Module, one: Participant, report: TrainingReport
    ) -> tuple[dict[str, State], float | None]:
        if not self._order.pipeline.needs:
            return {}, None
        loader = batches_to_measure(one.data, next(model.parameters()).device)
        sent, error = measured(self._order.config, model, loader, report, self._side.task)
        return dict(sent), error

    def _sent(
        self,
        block: list[tuple[int, Participant]],
        states: State,
        reports: list[TrainingReport],
        sent: list[dict[str, State]],
        errors: list[float | None],
    ) -> Iterator[StackedUpdates]:
        """The block, but for those whose update is damaged on the way: they come alone, as their shapes may differ."""
        whole, mishaps = self._block(block, states, reports, sent, errors), self._side.mishaps
        if mishaps is None:
            yield whole
            return
        start = 0
        for k, client in enumerate(whole.clients):
            if mishaps.sends_well(client, self.round):
                continue
            if start < k:
                yield whole[start:k]
            one = whole[k : k + 1]
            damaged = mishaps.sent({name: tensor[0] for name, tensor in one.states.items()}, client, self.round)
            yield replace(one, states={name: tensor[None] for name, tensor in damaged.items()})
            start = k + 1
        if start < len(whole):
            yield whole[start:] if start else whole

    def _block(
        self,
        block: list[tuple[int, Participant]],
        states: State,
        reports: list[TrainingReport],
        sent: list[dict[str, State]],
        errors: list[float | None],
    ) -> StackedUpdates:
        examples = [len(one.data) for _, one in block]
        each = state_bytes({name: tensor[0] for name, tensor in states.items()})
        withheld = bool(self._order.config.get(WITHHOLD_KEY))
        for (node, one), n, report, error in zip(block, examples, reports, errors, strict=True):
            loss = None if withheld else report.loss
            self.result.trained.append(Trained(one.client, node, n, loss, report.steps, error))
            self.result.bytes_up += each + 8 * (4 - withheld + (error is not None))
        self.result.bytes_up += sum(state_bytes(value) for values in sent for value in values.values())
        return StackedUpdates(
            tuple(one.client for _, one in block),
            states,
            tuple(map(float, examples)),
            tuple({name: decode(value) for name, value in values.items()} for values in sent),
        )

    def _fail(self, node: int, problem: BaseException) -> None:
        self.result.failures.append((node, failure_reason(node - FIRST_NODE, problem)))


def state_bytes(state: State) -> int:
    """Bytes of these tensors in a message."""
    return sum(_array_bytes(tensor.shape, tensor.dtype) for tensor in state.values())


@lru_cache(maxsize=4096)
def _array_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return len(to_arrays({"": torch.empty(shape, dtype=dtype)})[""].data)
