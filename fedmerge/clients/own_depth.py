"""Clients whose own models are shallower than the one that all are sent."""

from __future__ import annotations

from dataclasses import replace

from fedmerge.clients.client import Client
from fedmerge.clients.group import Group
from fedmerge.inputs import rows
from fedmerge.matching.deepening import deepened
from fedmerge.training.local import batches_to_measure

__all__ = ["fill_in_layers"]

_SHOWN = 128  # examples by which a client tells the layers of its own model


def fill_in_layers(client: Client, group: Group) -> Group:
    """Put layers without effect into a client's own model that is shallower than the one sent, once it is trained.

    Raises
    ------
    ModelError
        There are none that have no effect, see :func:`~fedmerge.matching.deepening.deepened`.
    """
    module = group.module
    if module is None or list(module.state_dict()) == list(client.template.state_dict()):
        return group
    inputs = next(iter(batches_to_measure(group.data[0].train, next(module.parameters()).device)))[0]
    module = deepened(module, client.template, rows(inputs, slice(_SHOWN)))
    states = {name: tensor.detach()[None] for name, tensor in module.state_dict().items()}
    return replace(group, module=module, states=states)
