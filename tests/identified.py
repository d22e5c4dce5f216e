"""Rounds whose replies are made by hand, by clients that may lie about who they are, on grids of several kinds."""

from __future__ import annotations

from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.wrapped_grid import WrappedGrid
from fedmerge.simulation.workers.flower_task import become_server_task, from_node, stamp
from fedmerge.strategies import MergeStrategy
from tests.federation import initial, noisy_states, reply

CLIENTS = 5

STATES = noisy_states(CLIENTS)

DRAWN = {p: 10**18 + 7 * (CLIENTS - p) for p in range(CLIENTS)}
"""Nodes by partition as Flower draws them: in no order."""

STRANGER = 987_654_321


class PlainGrid(WrappedGrid):
    """Nodes as Flower has them: with drawn ids, behind which nobody but the clients knows which partition is where."""

    def __init__(self, nodes=DRAWN):
        become_server_task()
        self.nodes = dict(nodes)

    def get_node_ids(self):
        return list(self.nodes.values())

    most_nodes = None

    def partition_of_node(self, node):
        return None

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError


def answered(message, content, node=None):
    found = Message(content, reply_to=message)
    return found if node is None else from_node(found, node)


@dataclass
class Round:
    """A strategy that has sent out the model, to nodes by partition."""

    grid: object = field(default_factory=PlainGrid)
    nodes: dict = field(default_factory=lambda: DRAWN)
    tells: bool = True
    strategy: MergeStrategy = field(default_factory=lambda: MergeStrategy("fedavg", on_too_few="skip"))
    number: int = 0

    def ask(self):
        """The messages of the next round, by partition."""
        self.number += 1
        sent = list(self.strategy.configure_train(self.number, initial(), ConfigRecord(), self.grid))
        for message in sent:
            stamp(message)
        of_node = {node: partition for partition, node in self.nodes.items()}
        return {of_node[message.metadata.dst_node_id]: message for message in sent}

    def content(self, partition, claim="own", state=None):
        told = partition if claim == "own" else claim
        told = None if not self.tells and claim == "own" else told
        made = reply(2, STATES[partition if state is None else state], 5 + partition).content
        if told is not None:
            made["client"] = ConfigRecord({"partition-id": told})
        return made

    def honest(self, messages=None):
        return {p: answered(m, self.content(p)) for p, m in (messages or self.ask()).items()}

    def merge(self, replies):
        """The merged tensors, and the names of whom was left out."""
        arrays, _ = self.strategy.aggregate_train(self.number, iter(replies))
        return None if arrays is None else {name: array.data for name, array in arrays.items()}

    @property
    def accepted(self):
        return self.strategy.last_report.accepted

    @property
    def dropped(self):
        return [bad.client for bad in self.strategy.last_report.dropped]


def merged_of(*partitions):
    """What these clients alone merge to."""
    known = Round()
    replies = known.honest()
    return known.merge([replies[p] for p in partitions])


def on(node):
    return f"on node {node}"


class DrawnGrid(SimulationGrid):
    """A simulation whose nodes have drawn ids, and of which one client may lie to the handshake."""

    lies: dict = {}  # noqa: RUF012

    def get_node_ids(self):
        return list(DRAWN.values())

    def send_and_receive(self, messages, *, timeout=None):
        found = []
        for message in messages:
            stamp(message)
            partition = next(p for p, node in DRAWN.items() if node == message.metadata.dst_node_id)
            claim = self.lies.get(partition, partition)
            if isinstance(claim, Error):
                found.append(answered(message, claim))
                continue
            content = RecordDict({} if claim is None else {"client": ConfigRecord({"partition-id": claim})})
            found.append(answered(message, content))
        return found[::-1]
