"""Who is who on the grids of a simulation: none of them takes one node for another."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedmerge.errors import ConfigError
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.simulation.grids.numbered_grid import NumberedGrid
from fedmerge.simulation.workers.flower_task import become_server_task, from_node
from fedmerge.strategies import FedAvg
from tests.federation import initial, tiny_app
from tests.identified import CLIENTS, STRANGER, DrawnGrid, PlainGrid, answered


@pytest.mark.parametrize("lie", [3, None, -1, Error(2, "no"), 2**40])
def test_who_lies_when_asked_for_its_partition_ends_nothing(lie, caplog):
    become_server_task()
    inner = DrawnGrid(tiny_app(), CLIENTS)
    inner.lies = {1: lie}
    grid = NumberedGrid(inner, CLIENTS)
    assert len(grid.get_node_ids()) == CLIENTS
    sure = [grid.partition_of_node(node) for node in range(2, CLIENTS + 2)]
    # Who tells none can only hold the one that is left; where two tell the same, neither is sure.
    assert sure == [0, -1, 2, -1, 4] if isinstance(lie, int) and lie == 3 else [0, 1, 2, 3, 4]
    assert "does not tell a partition of its own" in caplog.text


def test_where_no_node_tells_a_partition_of_its_own_the_remedy_is_told():
    become_server_task()
    inner = DrawnGrid(tiny_app(), CLIENTS)
    inner.lies = dict.fromkeys(range(CLIENTS), 0)
    with pytest.raises(ConfigError, match="several nodes tell the same"):
        NumberedGrid(inner, CLIENTS).get_node_ids()


def test_a_number_of_the_numbered_grid_is_never_a_strangers():
    become_server_task()

    class Crowded(DrawnGrid):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            found = super().send_and_receive(messages)
            odd = [3, 1, 0, None, STRANGER]
            return [*found, *(from_node(answered(messages[0], RecordDict()), node) for node in odd)]

    grid = NumberedGrid(Crowded(tiny_app(), CLIENTS), CLIENTS)
    nodes = list(grid.get_node_ids())
    sent = [Message(RecordDict(), dst_node_id=node, message_type="query.partition") for node in nodes]
    told = [reply.metadata.src_node_id for reply in grid.send_and_receive(sent)]
    assert sorted(node for node in told if node >= 2) == nodes
    assert len([node for node in told if node < 2]) == 5


def test_a_client_app_cannot_reply_for_another_node_of_a_simulation():

    app, honest = ClientApp(), tiny_app()

    @app.train()
    def train(message, context):
        answer = honest(message, context)
        if context.node_config["partition-id"] == 1:
            from_node(answer, 2)
        return answer

    with SimulationGrid(app, 3) as grid:
        strategy = FedAvg(fraction_evaluate=0.0)
        strategy.start(grid, initial(), num_rounds=1)
    assert strategy.last_report.accepted == (0, 2)
    (failed,) = strategy.last_report.failed
    assert failed.client == 1
    assert "names another node" in failed.reason


def test_steps_that_are_none_do_not_end_a_round():
    become_server_task()
    grid = MeasuredGrid(_Steps())
    for steps in (float("nan"), float("inf"), -1, 2**62, 1e300):
        _Steps.steps = steps
        grid.send_and_receive([Message(RecordDict(), dst_node_id=2, message_type="train")])
        assert grid.take()[0].local_steps is None


class _Steps(PlainGrid):
    steps = 0.0

    def send_and_receive(self, messages, *, timeout=None):
        content = RecordDict({"metrics": MetricRecord({"local-steps": self.steps})})
        return [answered(message, content) for message in messages]
