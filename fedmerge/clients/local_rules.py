"""Local rules on the client's road: what a method adds to gradients, and what a client keeps of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor, nn

from fedmerge.clients.group import Group, Instructions
from fedmerge.errors import InvalidOption
from fedmerge.state import State, accumulator_dtype
from fedmerge.training.correction import NO_CORRECTION, Correction
from fedmerge.training.report import TrainingReport
from fedmerge.training.rules.local_rule import LocalRule
from fedmerge.wire.flower_records import RULE_RECORD
from fedmerge.wire.keys import MISSED_KEY
from fedmerge.wire.record_values import from_arrays, integer, strings, to_arrays

__all__ = ["corrections", "keep_rule", "starting_point", "take_back", "to_keep"]

_KEPT, _BEFORE, _ROUND = "fedmerge.rule.", "fedmerge.before.", "fedmerge.round."
"""What a client keeps of a rule, what it kept before its last training, and the round of that."""


def corrections(group: Group) -> tuple[Correction, ...]:
    """What is added to the gradients of each client of a group.

    Raises
    ------
    InvalidOption
        The tensors that came do not fit the model.
    """
    rule = group.order.told.rule
    if rule is None:
        return (NO_CORRECTION,) * len(group)
    sent = _sent(group)
    return tuple(rule.correction(sent, kept) for kept in _kept(group, rule))


def starting_point(group: Group, module: nn.Module) -> dict[str, Tensor]:
    """The parameters that a group trains and sends, as they are before training, where its rule keeps something."""
    rule, parts = group.order.told.rule, group.order.parts
    if rule is None or not rule.keeps:
        return {}
    own = () if parts is None else parts.layout.personal
    free = ((name, p) for name, p in module.named_parameters() if p.requires_grad and name not in own)
    return {name: parameter.detach().clone() for name, parameter in free}


def to_keep(
    group: Group, start: State, states: State, reports: tuple[TrainingReport, ...]
) -> tuple[dict[str, Tensor], ...]:
    """What each client of a group is to keep of its training, before anything is done to what it sends.

    Parameters
    ----------
    group
        The clients.
    start
        The parameters that they started from.
    states
        Tensors [K, ...] after training.
    reports
        What training did.
    """
    rule = group.order.told.rule
    if rule is None or not rule.keeps:
        return ()
    sent, found = _sent(group), []
    for row, (kept, report) in enumerate(zip(_kept(group, rule), reports, strict=True)):
        moved = {name: _precise(before) - _precise(states[name][row]) for name, before in start.items()}
        found.append(rule.keep(moved, sent, kept, report))
    return tuple(found)


def keep_rule(group: Group) -> None:
    """Have each client keep what its training has left for it in the group, and what it kept before."""
    rule = group.order.told.rule
    if rule is not None and rule.keeps:
        for record, tensors in zip(group.kept, group.ruled, strict=True):
            _move(record, _KEPT + rule.name, _BEFORE + rule.name)
            record[_KEPT + rule.name] = to_arrays(tensors)
            record[_ROUND + rule.name] = ConfigRecord({"round": group.order.told.server_round})


def take_back(kept: RecordDict, told: Instructions, node: int | None) -> None:
    """Have a client go back to what it kept before its last training, where the server has not merged its reply.

    The server's tensors of the rule have not moved then: SCAFFOLD's c is the mean of all c_i only if neither has. A
    server that repeats a round, as after a crash, has not merged it either.
    """
    rule = told.rule
    trained = None if rule is None else kept.config_records.get(_ROUND + rule.name)
    if rule is None or trained is None:
        return
    missed = dict(entry.split(":", 1) for entry in strings(told.config, MISSED_KEY))
    if integer(trained, "round") >= int(missed.get(str(node), told.server_round)):
        _move(kept, _BEFORE + rule.name, _KEPT + rule.name)
        kept.pop(_ROUND + rule.name)


def _move(kept: RecordDict, source: str, target: str) -> None:
    """Put one record, or its absence, in the place of another."""
    kept.pop(target, None)
    if source in kept:
        kept[target] = kept.pop(source)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.detach().to(accumulator_dtype(tensor.dtype))


def _kept(group: Group, rule: LocalRule) -> list[dict[str, Tensor]]:
    """What each client has kept, where it was of this model: after a change of widths it starts anew."""
    if not rule.keeps:
        return [{} for _ in group.clients]
    if not group.kept:
        raise InvalidOption(f"local rule {rule.name!r} has clients keep tensors, and these have no memory to keep them")
    return [_read(record, _KEPT + rule.name, group) for record in group.kept]


def _read(record: RecordDict, key: str, group: Group) -> dict[str, Tensor]:
    return _placed(record.array_records.get(key), group)


def _sent(group: Group) -> dict[str, Tensor]:
    return _placed(group.order.brought.get(RULE_RECORD), group)


def _placed(record: ArrayRecord | None, group: Group) -> dict[str, Tensor]:
    """The tensors of a record, on the model's device, if they are of its shapes."""
    if record is None:
        return {}
    tensors = from_arrays(record)
    shapes = _shapes(group)
    other = [name for name, tensor in tensors.items() if shapes.get(name) != tensor.shape]
    if other:
        raise InvalidOption(
            f"the tensors of the local rule are not of the model sent: {other[0]!r} has shape "
            f"{[*tensors[other[0]].shape]}; such methods need one architecture in all rounds"
        )
    device = _device(group)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _shapes(group: Group) -> Mapping[str, torch.Size]:
    if group.module is None:
        return {name: tensor.shape for name, tensor in group.order.state.items()}
    return {name: parameter.shape for name, parameter in group.module.named_parameters()}


def _device(group: Group) -> torch.device:
    return torch.device("cpu") if group.module is None else next(group.module.parameters()).device
