"""Batch norms measured by the clients, one of whom may send what no batch norm can be."""

from __future__ import annotations

import pytest
import torch

from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.wrapped_grid import WrappedGrid
from fedmerge.strategies import MergeStrategy, from_arrays, to_arrays
from tests.federation import CLIENTS, initial, tiny_app


class Forged(WrappedGrid):
    """One client's measured moments are changed on the way."""

    def __init__(self, grid, node, change):
        super().__init__(grid)
        self._node, self._change = node, change

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        nodes = sorted(message.metadata.dst_node_id for message in messages)
        for reply in replies:
            if reply.metadata.message_type == "query.statistics" and reply.metadata.src_node_id == nodes[self._node]:
                (key,) = reply.content.array_records
                reply.content[key] = to_arrays(self._change(from_arrays(reply.content[key])))
        return replies


def recalibrated(node=0, change=lambda moments: moments):
    strategy = MergeStrategy("fedavg", batch_norm="recalibrate", fraction_evaluate=0.0)
    with SimulationGrid(tiny_app(), CLIENTS) as grid:
        found = from_arrays(strategy.start(Forged(grid, node, change), initial(), num_rounds=1).arrays)
    return {name: tensor for name, tensor in found.items() if "running" in name}


def negative(moments):
    return {n: -1e3 * torch.ones_like(t) if n.endswith("running_var") else t for n, t in moments.items()}


@pytest.mark.parametrize("node", range(CLIENTS))
def test_a_client_whose_variances_are_negative_is_left_out_of_a_recalibration(node, caplog):
    """The root of the pooled variance would be NaN for everybody."""
    found = recalibrated(node, negative)
    without = recalibrated(node, lambda moments: {})
    assert caplog.text.count("its batch-norm statistics cannot be used and are left out") == 2
    assert all(torch.equal(found[name], without[name]) for name in found)
    assert bool((found["1.running_var"] > 0).all())
    assert not torch.equal(found["1.running_var"], recalibrated()["1.running_var"])
