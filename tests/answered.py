"""A strategy of every registered method, and what clients answer to it: for tests that hand it worse replies."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import nn

import fedmerge
from fedmerge.registry import entry
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.workers.flower_task import become_server_task, stamp
from fedmerge.strategies import MergeStrategy, client_app, to_arrays
from tests.contract.table import ROWS
from tests.federation import CLIENTS, TRAINING, tiny_data, tiny_model

METHODS = tuple(name for name in fedmerge.methods() if not entry("aggregator", name).cls.moves_base)
"""Rules that add to a frozen base want a model with one: tests/aggregators/test_folding_rules.py has them."""


class OddModel(nn.Sequential):
    """The tiny model with a 0-d parameter, and buffers of all kinds: empty ones, halves, doubles, counters, flags."""

    def __init__(self) -> None:
        super().__init__(*tiny_model())
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("halves", torch.full((2,), 0.5, dtype=torch.float16))
        self.register_buffer("brains", torch.full((2,), 0.25, dtype=torch.bfloat16))
        self.register_buffer("doubles", torch.full((2,), 0.1, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor([False, True]))
        self.register_buffer("count", torch.tensor(2**40))


def odd_app(model_fn=OddModel):
    """Clients that train it."""
    return client_app(model_fn, tiny_data, training=TRAINING)


def odd_arrays(model_fn=OddModel) -> ArrayRecord:
    """Its state as it is sent."""
    return to_arrays(model_fn().state_dict())


def strategy_of(method: str, model_fn=OddModel, **keywords) -> MergeStrategy:
    """A strategy with all that any method may want to know."""
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(24) % 3
    known = {"model_fn": model_fn, "example": inputs[:2], "data": [(inputs, labels)], "repair": "none"}
    return MergeStrategy(method, **{**known, **pairs_of(method), **keywords})


def pairs_of(method: str) -> dict[str, Any]:
    """Which of the model's layers are a low-rank pair, for rules that merge such."""
    rows = (row.options for row in ROWS if row.method == method)
    return next(({"pairs": options["pairs"]} for options in rows if "pairs" in options), {})


class Asked:
    """A strategy that has sent out the model, the grid that it sent it by, and what came back."""

    def __init__(
        self, method: str, clients: int = CLIENTS, model_fn=OddModel, wrapped=lambda grid: grid, app=None, **keywords
    ) -> None:
        become_server_task()
        self.strategy = strategy_of(method, model_fn, fraction_evaluate=0.0, **keywords)
        self.grid = wrapped(SimulationGrid(app or odd_app(model_fn), clients))
        self.arrays = odd_arrays(model_fn)
        messages = self.strategy.configure_train(1, self.arrays, ConfigRecord(), self.grid)
        self.contents = [m.content for m in self.grid.send_and_receive(list(messages))]
        self._kept = {node: shallow(state) for node, state in self.grid.client_states().items()}

    def remind(self) -> None:
        """Let clients have kept their models: a merge of several exchanges uses them up."""
        self.grid.set_client_states({node: shallow(state) for node, state in self._kept.items()})

    def replies(self, contents=None) -> list[Message]:
        """Messages of the clients' nodes with these contents, or with what they answered."""
        nodes = list(self.grid.get_node_ids())
        self.remind()
        given = [shallow(one) for one in self.contents] if contents is None else contents
        return [answer(nodes[i % len(nodes)], content) for i, content in enumerate(given)]


@cache
def asked(method: str) -> Asked:
    """The same one for many tests, each of which merges once."""
    return Asked(method)


def shallow(content: RecordDict) -> RecordDict:
    """A copy whose records may be changed; arrays are shared."""
    return RecordDict({key: type(record)(dict(record)) for key, record in content.items()})


def answer(node: int, content, message_type: str = "train") -> Message:
    """A reply of a node, with a RecordDict or an Error."""
    request = Message(RecordDict(), dst_node_id=node, message_type=message_type)
    stamp(request)
    return Message(content, reply_to=request)
