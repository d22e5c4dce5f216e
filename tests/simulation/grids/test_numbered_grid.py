"""Stable numbers for nodes whose ids Flower draws."""

from __future__ import annotations

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmerge.errors import ConfigError
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.numbered_grid import NumberedGrid
from fedmerge.strategies import FedAvg, MergeStrategy
from tests.federation import CLIENTS, initial, tiny_app

NODES = {2: 9_000_000_001, 3: 77, 4: 5_000_000_000}


class DrawnGrid(SimulationGrid):
    """A simulation whose nodes have ids in no order, as Flower's have."""

    def get_node_ids(self):
        return list(NODES.values())

    def _context(self, node):
        own = next(number for number, drawn in NODES.items() if drawn == node)
        context = self._contexts.get(node)
        return context or Context(1, node, {"partition-id": own - 2, "num-partitions": CLIENTS}, _empty(), {})


def _empty():
    from flwr.app import RecordDict

    return RecordDict()


@pytest.mark.parametrize("batch_norm", ["mean", "recalibrate"])
def test_a_seed_samples_the_same_clients_under_drawn_ids(batch_norm):
    def final(grid):
        strategy = MergeStrategy("fedavg", batch_norm=batch_norm, seed=3, fraction_train=0.7, fraction_evaluate=0.0)
        result = strategy.start(grid, initial(), num_rounds=4)
        return {name: array.data for name, array in result.arrays.items()}, strategy.last_report.accepted

    stable = final(SimulationGrid(tiny_app(), CLIENTS))
    assert final(NumberedGrid(DrawnGrid(tiny_app(), CLIENTS), CLIENTS)) == stable
    assert len(stable[1]) == 2


def test_replies_come_in_the_order_of_partitions_however_they_arrive():
    class Shuffled(DrawnGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return list(super().send_and_receive(messages))[::-1]

    grid = NumberedGrid(Shuffled(tiny_app(), CLIENTS), CLIENTS)
    nodes = list(grid.get_node_ids())
    sent = [Message(_empty(), dst_node_id=node, message_type="query.partition") for node in nodes]
    assert [reply.metadata.src_node_id for reply in grid.send_and_receive(sent)] == nodes == [2, 3, 4]


def test_waits_for_all_nodes():
    assert NumberedGrid(DrawnGrid(tiny_app(), CLIENTS), CLIENTS + 1).get_node_ids() == []


def test_clients_that_do_not_tell_their_partition_are_named():
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return message

    with pytest.raises(ConfigError, match="node 9000000001 does not tell its partition"):
        FedAvg().start(NumberedGrid(DrawnGrid(app, CLIENTS), CLIENTS), initial(), num_rounds=1)
