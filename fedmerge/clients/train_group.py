"""The stage of the client road that trains: one client in its module, or several stacked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor, nn

from fedmerge.clients.client import Client
from fedmerge.clients.group import Group
from fedmerge.clients.local_rules import corrections, starting_point, to_keep
from fedmerge.clients.own_parts import unmeasured
from fedmerge.errors import ModelError
from fedmerge.training.cohort import train_cohort
from fedmerge.training.cohort_batches import Participant
from fedmerge.training.correction import NO_CORRECTION, Correction
from fedmerge.training.local import train as train_one
from fedmerge.training.local_training import LocalTraining
from fedmerge.training.report import TrainingReport

__all__ = ["train"]

_PHASES = 1 << 40  # more than there are rounds and stages: what is trained first draws batches of its own

Phase = tuple[int, Collection[str], LocalTraining]
"""One of a client's trainings in a round: which names its random streams, what stays as it is, and how it trains."""
Trained = tuple[dict[str, Tensor], tuple[TrainingReport, ...]]


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
