"""A tiny federation for tests: three clients, a small model with batch norm, data drawn from a seed."""

from __future__ import annotations

import os
import time

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import nn

from fedmerge.data import ClientData
from fedmerge.simulation.workers.flower_task import become_server_task, stamp
from fedmerge.strategies import client_app, to_arrays
from fedmerge.training import LocalTraining

CLIENTS = 3
TRAINING = LocalTraining(learning_rate=0.1, momentum=0.0, epochs=1, batch_size=4)


def tiny_model() -> nn.Module:
    """Linear layers around a batch norm."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def plain_model() -> nn.Module:
    """The same without batch norm: nothing but parameters, as differential privacy wants it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def tiny_data(partition: int, total: int) -> ClientData:
    """8, 12 or 16 examples for training and 4 held out, different for every client."""
    generator = torch.Generator().manual_seed(partition)
    n = 8 + 4 * partition
    x, y = torch.randn(n + 4, 4, generator=generator), torch.randint(0, 3, (n + 4,), generator=generator)
    return ClientData(x[:n], y[:n], x[n:], y[n:])


def tiny_app(*mods, model_fn=tiny_model):
    """The federation's ClientApp."""
    return client_app(model_fn, tiny_data, training=TRAINING, mods=mods)


def slow_data(partition: int, total: int) -> ClientData:
    """Of clients that take their time, so that there is a middle of the round to disturb."""
    time.sleep(0.1)
    return tiny_data(partition % CLIENTS, total)


def hanging_data(partition: int, total: int) -> ClientData:
    """Client 1 hangs, client 4 takes its process with it."""
    if partition == 1:
        time.sleep(3600)
    if partition == 4:
        os._exit(1)
    return tiny_data(partition % CLIENTS, total)


def slow_app():
    """A ClientApp on :func:`slow_data`."""
    return client_app(tiny_model, slow_data, training=TRAINING)


def initial(model_fn=tiny_model) -> ArrayRecord:
    """The initial global model."""
    return to_arrays(model_fn().state_dict())


def noisy_states(count: int = CLIENTS) -> list[dict[str, torch.Tensor]]:
    """States as clients may send them: the initial model plus noise, counters counted on."""
    states = []
    for client in range(count):
        generator = torch.Generator().manual_seed(100 + client)
        state = {}
        for name, tensor in tiny_model().state_dict().items():
            if tensor.is_floating_point():
                state[name] = tensor + 0.1 * torch.rand(tensor.shape, generator=generator)
            else:
                state[name] = tensor + client + 1
        states.append(state)
    return states


def reply(node: int, state, examples: float = 1, *, partition: int | None = None, extra=None, **metrics) -> Message:
    """A reply of node `node` as Flower hands it to a strategy."""
    become_server_task()
    request = Message(RecordDict(), dst_node_id=node, message_type="train")
    stamp(request)
    content = RecordDict({"arrays": ArrayRecord(state)})
    content["metrics"] = MetricRecord({"num-examples": examples, **metrics})
    if partition is not None:
        content["client"] = ConfigRecord({"partition-id": partition})
    for key, record in (extra or {}).items():
        content[key] = record
    return Message(content, reply_to=request)
