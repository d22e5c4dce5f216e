"""The road of a client through one order: its stages, each written once.

    receive ─► enter ─► add_own ─► train ─► attack ─► deepen ─► keep ─► measure ─► fault ─► encode

A message, a client of a cohort that trains by itself, and many clients that train stacked go through the same stages;
only the number of those who go together differs. :mod:`fedmerge.clients` says where to add to them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace

from flwr.app import RecordDict
from torch import Tensor, nn

from fedmerge.clients.client import Client, receive
from fedmerge.clients.group import Group, Received
from fedmerge.clients.kept_in_context import caught_up, kept_buffers, remember
from fedmerge.clients.local_rules import corrections, keep_rule, starting_point, take_back, to_keep
from fedmerge.clients.measure import measured
from fedmerge.clients.own_depth import fill_in_layers
from fedmerge.clients.own_parts import unmeasured
from fedmerge.data.client_data import client_data
from fedmerge.errors import ModelError
from fedmerge.state import State
from fedmerge.training.cohort import train_cohort
from fedmerge.training.cohort_batches import Participant
from fedmerge.training.correction import NO_CORRECTION, Correction
from fedmerge.training.local import batches_to_measure
from fedmerge.training.local import train as train_one
from fedmerge.training.local_training import LocalTraining
from fedmerge.training.report import TrainingReport
from fedmerge.wire.flower_records import STEPS_KEY
from fedmerge.wire.keys import ERROR_KEY

__all__ = [
    "AFTER_TRAINING",
    "STAGES",
    "add_own",
    "attack",
    "deepen",
    "encode",
    "enter",
    "fault",
    "keep",
    "measure",
    "metrics_of",
    "receive",
    "run",
    "train",
]


Stage = Callable[[Client, Group], Group]
_PHASES = 1 << 40  # more than there are rounds and stages: what is trained first draws batches of its own

Phase = tuple[int, Collection[str], LocalTraining]
"""One of a client's trainings in a round: which names its random streams, what stays as it is, and how it trains."""
Trained = tuple[dict[str, Tensor], tuple[TrainingReport, ...]]


def enter(
    client: Client, order: Received, number: int, total: int, kept: RecordDict | None = None, node: int | None = None
) -> Group:
    """One client takes up an order, with its examples.

    Parameters
    ----------
    client
        The client side.
    order
        What it received.
    number, total
        Of the client, and how many clients there are.
    kept
        What it remembers, if anything.
    node
        By which number the server knows it, as far as there is one.

    Raises
    ------
    DataError
        Its examples cannot be had.
    InjectedFault
        It crashes.
    """
    # One that stayed until the first stage of a round was over stays to its end.
    if client.mishaps is not None and not order.told.stage:
        client.mishaps.begin(number, order.told.round)
    data = client_data(client.data_fn, number, total)
    if kept is not None and order.told.rule is not None and not order.told.stage:
        take_back(kept, order.told, node)
    return Group(order, (number,), (data,), () if kept is None else (kept,))


def add_own(client: Client, group: Group) -> Group:
    """The model that they train: the one sent, with what is a client's own, and without what is frozen.

    A client's own are its personal part, its batch norms, the model that it kept for a stage, or one to start the
    first round from. Frozen tensors are those that all make alike.

    Raises
    ------
    ModelError
        The model sent does not fit the clients' own, or not their examples.
    """
    order, told = group.order, group.order.told
    state: State = order.state
    if told.stage:
        state = caught_up(group.kept[0], order.brought)
    if told.keeps_buffers and group.kept and len(group) == 1:
        state = {**state, **kept_buffers(group.kept[0])}
    kept = group.kept[0] if group.kept and len(group) == 1 else None
    module = client.fitted(order.completed(state, kept))
    mine = _own_of_each(group) if len(group) > 1 else ()
    own = client.own_model(told, group.clients[0])
    if own is not None:
        module = own if order.parts is None else order.parts.join(own, kept)
    if client.own_ranks is not None:
        client.own_ranks.cut(module, group.clients[0])
    still = {*told.frozen, *told.held(name for name, parameter in module.named_parameters() if parameter.requires_grad)}
    for name, parameter in module.named_parameters() if still else ():
        if name in still:
            parameter.requires_grad_(False)
    client.check_outputs(module, group.data[0].train)
    start = None
    if client.tamper is not None:
        start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return replace(group, module=module, own=mine, start=start)


def _own_of_each(group: Group) -> tuple[State, ...]:
    """Tensors that each client of a stack has kept: its personal part, and batch norms that stay with it."""
    parts, told = group.order.parts, group.order.told
    own: list[State] = []
    for kept in group.kept:
        buffers = kept_buffers(kept) if told.keeps_buffers else {}
        own.append({**buffers, **({} if parts is None else parts.kept(kept))})
    return tuple(own)


def train(client: Client, group: Group) -> Group:
    """Train them: one in its module, several stacked.

    Raises
    ------
    CannotStack
        Several that cannot train stacked.
    ModelError
        The model sent has widths that do not go with the examples.
    """
    told, parts, module = group.order.told, group.order.parts, group.module
    if module is None:
        raise ModelError("a client trains before it has a model: add_own comes before train")
    added = (NO_CORRECTION,) * len(group) if told.rule is None else corrections(group)
    start = {} if told.rule is None else starting_point(group, module)
    all_phases = [((), told.training)] if parts is None else parts.phases(told.training)
    phases = [(told.round + (len(all_phases) - 1 - i) * _PHASES, *phase) for i, phase in enumerate(all_phases)]
    train_phases = _train_together if len(group) > 1 else _train_alone
    states, reports = train_phases(client, group, module, added, phases)
    ruled = to_keep(group, start, states, reports) if start else ()
    return replace(group, module=module if len(group) == 1 else None, states=states, reports=reports, ruled=ruled)


def _train_alone(
    client: Client, group: Group, module: nn.Module, added: Sequence[Correction], phases: Sequence[Phase]
) -> Trained:
    (number,), (data,) = group.clients, group.data
    for round, still, settings in phases:
        with client.telling(module), unmeasured(module, still) if still else nullcontext():
            report = train_one(
                module, data.train, None, settings,
                seed=group.order.told.seed, client=number, round=round, task=client.task,
                correction=added[0], held_out=data.held_out,
            )  # fmt: skip
    return {name: tensor.detach()[None] for name, tensor in module.state_dict().items()}, (report,)


def _train_together(
    client: Client, group: Group, module: nn.Module, added: Sequence[Correction], phases: Sequence[Phase]
) -> Trained:
    parts, own = group.order.parts, group.own or ({},) * len(group)
    states: dict[str, Tensor] = {}
    for round, still, settings in phases:
        if states:  # a later phase goes on from the one before
            moved = {name: t for name, t in states.items() if parts is None or name not in parts.layout.known}
            own = tuple({name: stacked[row] for name, stacked in moved.items()} for row in range(len(group)))
        people = [
            Participant(number, data.train, offset=correction.offset, start=mine)
            for number, data, correction, mine in zip(group.clients, group.data, added, own, strict=True)
        ]
        with unmeasured(module, still) if still else nullcontext():
            done = train_cohort(
                module, people, settings,
                seed=group.order.told.seed, round=round, pull=added[0].pull, task=client.task,
            )  # fmt: skip
        states, reports = done.states, tuple(done.reports)
    return states, reports


def attack(client: Client, group: Group) -> Group:
    """Put what hostile clients send in the place of what they trained."""
    if client.tamper is None or group.start is None or group.states is None:
        return group
    alone = len(group) == 1
    # Of one client they lie in its module, on which statistics are measured.
    ours = {name: group.states[name] if alone else group.states[name].clone() for name in group.start}
    for row, number in enumerate(group.clients):
        trained = {name: stacked[row] for name, stacked in ours.items()}
        mine = group.own[row] if group.own else {}
        start = {name: mine.get(name, tensor) for name, tensor in group.start.items()}
        for name, tensor in client.tamper(trained, start, number, group.order.told.round).items():
            ours[name][row].copy_(tensor)
    return group if alone else replace(group, states={**group.states, **ours})


def keep(client: Client, group: Group) -> Group:
    """Have each client keep what it is to find in the next order."""
    for row, kept in enumerate(group.kept):
        remember(kept, group.order.told, group.state(row), client.float_buffers)
        if group.order.parts is not None:
            group.order.parts.keep(group.state(row), kept)
    if group.ruled:
        keep_rule(group)
    return group


def measure(client: Client, group: Group) -> Group:
    """Measure the statistics that the order asks for, on each client's model and examples."""
    returned = group.returned or ({},) * len(group)
    if not group.order.told.measures:
        return replace(group, statistics=returned, errors=(None,) * len(group))
    parts, found = group.order.parts, []
    for row, (data, report) in enumerate(zip(group.data, group.reports, strict=True)):
        module = group.module or client.fitted(group.state(row))
        loader = batches_to_measure(data.train, next(module.parameters()).device)
        with client.telling(module), nullcontext() if parts is None else parts.measured(module):
            found.append(measured(group.order.told.config, module, loader, report, client.task))
    statistics = tuple({**back, **sent} for back, (sent, _) in zip(returned, found, strict=True))
    return replace(group, statistics=statistics, errors=tuple(error for _, error in found))


def fault(client: Client, group: Group) -> Group:
    """Damage what a client with a fault sends. It goes alone, for what it sends may have any shape."""
    told = group.order.told
    if client.mishaps is None or told.stage or len(group) > 1:
        return group
    damaged = client.mishaps.sent(group.order.travelling(group.state()), group.clients[0], told.round)
    return replace(group, states={name: tensor[None] for name, tensor in damaged.items()})


def encode(client: Client, group: Group) -> Group:
    """Leave only what travels, on the CPU: all that is trained, or what a later stage asks for."""
    told, states = group.order.told, group.order.travelling(group.states or {})
    held = told.held(states)
    states = {name: tensor for name, tensor in states.items() if name not in held} if held else states
    if client.own_ranks is not None:
        states = client.own_ranks.sent(states, group.clients[0])
    if client.mods and not told.stage and set(states) < set(group.order.state):
        # Flower's mods want the names that the message brought: what of them does not travel goes back as it came.
        states = {name: states.get(name, tensor[None]) for name, tensor in group.order.state.items()}
    sent = {name: stacked.cpu() for name, stacked in states.items() if not told.stage or name in told.wanted}
    return replace(group, module=None, start=None, states=sent)


def deepen(client: Client, group: Group) -> Group:
    """Bring a client's own model, where it is shallower than the one sent, to the depth of that."""
    return group if client.own_model_fn is None else fill_in_layers(client, group)


TOGETHER: tuple[Stage, ...] = (add_own, train, attack, deepen)
"""Stages that a stack of clients goes through as one."""
AFTER_TRAINING: tuple[Stage, ...] = (keep, measure, fault, encode)
"""Stages that a client with something to keep, to measure or to break goes through by itself."""
STAGES: tuple[Stage, ...] = TOGETHER + AFTER_TRAINING
"""What a client does, once it has taken up an order."""


def run(client: Client, group: Group, stages: Sequence[Stage] = STAGES) -> Group:
    """Go through stages, one after the other."""
    for stage in stages:
        group = stage(client, group)
    return group


def metrics_of(group: Group, row: int = 0) -> dict[str, int | float]:
    """What a client tells besides tensors."""
    report, error = group.reports[row], group.errors[row]
    loss = {} if group.order.told.withholds else {"train_loss": report.loss}
    told = {"num-examples": len(group.data[row]), **loss, STEPS_KEY: report.steps}
    return told if error is None else {**told, ERROR_KEY: error}
