"""The stages of a client's road: one list, whoever goes down it, and the seams where more may be hung in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedmerge.clients import client_app
from fedmerge.clients.group import Group
from fedmerge.clients.road import AFTER_TRAINING, STAGES, TOGETHER, attack, encode, enter, measure, receive, run, train
from fedmerge.errors import ModelError
from fedmerge.simulation.scenarios.attacks import SignFlip
from fedmerge.simulation.scenarios.hostile_clients import Hostile
from fedmerge.simulation.workers.flower_task import become_server_task, stamp
from fedmerge.strategies import from_arrays
from fedmerge.wire.record_values import to_arrays
from tests.federation import CLIENTS, TRAINING, initial, plain_model, tiny_data, tiny_model

CONFIG = {"server-round": 1, "seed": 3}


def side(model_fn=tiny_model, **keywords):
    return client_app(model_fn, tiny_data, training=TRAINING, **keywords).client


def ordered(client, model_fn=tiny_model, **config):
    content = RecordDict({"arrays": initial(model_fn), "config": ConfigRecord({**CONFIG, **config})})
    return receive(client, content)


def entered(client, order, kept=None):
    return [enter(client, order, number, CLIENTS, kept) for number in range(CLIENTS)]


def test_the_stages_of_a_stack_are_those_of_one_client():
    assert STAGES == TOGETHER + AFTER_TRAINING
    assert STAGES.index(train) < STAGES.index(attack) < STAGES.index(measure) < STAGES.index(encode)


@pytest.mark.parametrize("hostile", [None, Hostile(SignFlip(2.0), frozenset({1}), 3, 0)], ids=["honest", "attacked"])
def test_a_stack_ends_where_single_clients_do(hostile):
    client = side(tamper=hostile)
    order = ordered(client)
    alone = []
    for group in entered(client, order):
        alone.append({name: tensor.clone() for name, tensor in run(client, group).state().items()})
    stack = run(client, Group.joined(entered(client, order)))
    assert len(stack) == CLIENTS
    for row, state in enumerate(alone):
        for name, tensor in stack.state(row).items():
            torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-5, msg=f"client {row}: {name}")


def test_a_message_gives_what_the_stages_give():
    app = client_app(tiny_model, tiny_data, training=TRAINING)
    become_server_task()
    message = Message(
        RecordDict({"arrays": initial(), "config": ConfigRecord({**CONFIG, "needs": ["fisher_diag"]})}),
        dst_node_id=3, message_type="train",
    )  # fmt: skip
    stamp(message)
    context = Context(1, 3, {"partition-id": 1, "num-partitions": CLIENTS}, RecordDict(), {})
    reply = app(message, context).content
    gone = run(app.client, enter(app.client, receive(app.client, message.content), 1, CLIENTS, RecordDict()))
    assert all(torch.equal(tensor, gone.state()[name]) for name, tensor in from_arrays(reply["arrays"]).items())
    (sent,) = gone.statistics
    assert list(sent) == ["fisher_diag"]
    told = from_arrays(reply["statistics.fisher_diag"])
    assert all(torch.equal(tensor, told[name]) for name, tensor in sent["fisher_diag"].items())


def test_what_a_local_rule_sends_back_travels_beside_what_is_measured():
    """A rule with a state of its own: it reads what came with the order, and what the client kept."""

    def counting(client, group):
        group = train(client, group)
        (kept,), (step,) = group.kept, from_arrays(group.order.brought["step"]).values()
        before = from_arrays(kept["count"])["n"] if "count" in kept else torch.zeros(1)
        kept["count"] = to_arrays({"n": before + step})
        return replace(group, returned=({"count": {"n": before + step}},))

    client, kept = side(), RecordDict()
    stages = [counting if stage is train else stage for stage in STAGES]
    for expected in (2.0, 4.0):
        content = RecordDict({"arrays": initial(), "step": to_arrays({"n": torch.full((1,), 2.0)})})
        content["config"] = ConfigRecord({**CONFIG, "needs": ["fisher_diag"]})
        gone = run(client, enter(client, receive(client, content), 0, CLIENTS, kept), stages)
        assert gone.statistics[0]["count"]["n"].item() == expected
        assert set(gone.statistics[0]) == {"count", "fisher_diag"}


def test_batch_norms_that_stay_are_found_in_the_next_order():
    client, kept = side(), RecordDict()
    first = run(client, enter(client, ordered(client, **{"batch-norm": "local"}), 0, CLIENTS, kept))
    trained = first.state()["1.running_mean"].clone()
    assert not torch.equal(trained, torch.zeros(6))
    order = ordered(client, **{"batch-norm": "local", "server-round": 2})
    (add_own, *_) = STAGES
    group = add_own(client, enter(client, order, 0, CLIENTS, kept))
    assert torch.equal(group.module.state_dict()["1.running_mean"], trained)


def test_nothing_of_one_client_is_left_for_the_next():
    client = side()
    order = ordered(client)
    before, _, after = (
        {name: tensor.clone() for name, tensor in run(client, enter(client, order, number, CLIENTS)).state().items()}
        for number in (0, 2, 0)
    )
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_model_of_another_architecture_is_told_by_either_road():
    client = side()
    order = ordered(client, plain_model)
    with pytest.raises(ModelError, match="does not fit the Sequential that model_fn makes"):
        run(client, entered(client, order)[0])


def test_an_order_without_a_model_is_told():
    with pytest.raises(ModelError, match="brings no ArrayRecord"):
        receive(side(), RecordDict({"config": ConfigRecord(CONFIG)}))
    array = initial()["0.weight"]
    cut = type(array)(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data[:-1])
    content = RecordDict({"arrays": ArrayRecord({"0.weight": cut}), "config": ConfigRecord(CONFIG)})
    with pytest.raises(ModelError, match="cannot be decoded"):
        receive(side(), content)
