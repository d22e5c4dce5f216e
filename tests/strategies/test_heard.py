"""Which replies count: of a node that was asked, one each, to the message that it got, in every exchange."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.wrapped_grid import WrappedGrid
from fedmerge.simulation.workers.flower_task import from_node, stamp
from fedmerge.strategies import from_arrays
from fedmerge.strategies.heard import Sent, heard
from tests.answered import OddModel, odd_app, odd_arrays, strategy_of
from tests.federation import initial, reply
from tests.identified import CLIENTS, DRAWN, STATES, STRANGER, Round, answered, merged_of, on


def test_a_node_that_was_not_asked_is_named_and_left_out(caplog):
    for partition in (0, 5, None):
        known = Round()
        messages = known.ask()
        stranger = answered(messages[0], known.content(0, partition), STRANGER)
        assert known.merge([stranger, *known.honest(messages).values()]) == merged_of(*range(CLIENTS))
        assert known.dropped == [on(STRANGER)]
    assert f"client on node {STRANGER}: its node was not asked" in caplog.text


def test_nobody_but_strangers_merges_nothing():
    known = Round()
    messages = known.ask()
    assert known.merge([answered(messages[0], known.content(0), STRANGER)]) is None
    assert "was not asked" in known.strategy.last_report.skipped
    assert len(known.strategy.last_report.failed) == CLIENTS


def test_a_node_that_says_the_same_twice_counts_once_and_one_that_contradicts_itself_not_at_all():
    known = Round()
    messages = known.ask()
    replies = known.honest(messages)
    again = answered(messages[2], known.content(2))
    assert known.merge([*replies.values(), again, again]) == merged_of(*range(CLIENTS))
    assert "again with the same" in known.strategy.last_report.dropped[0].reason
    for other in (known.content(2, state=1), known.content(2, claim=4), RecordDict()):
        for order in (1, -1):
            twice = [*replies.values(), answered(messages[2], other)][::order]
            assert known.merge(twice) == merged_of(0, 1, 3, 4)
            assert known.dropped == [on(DRAWN[2])] * 2


def test_an_error_beside_a_reply_is_told_and_does_not_void_it():
    known = Round()
    messages = known.ask()
    failed = answered(messages[2], Error(1, "client 4: gone"))
    assert known.merge([failed, *known.honest(messages).values(), failed]) == merged_of(*range(CLIENTS))
    (told,) = known.strategy.last_report.failed
    assert (told.client, told.reason) == (on(DRAWN[2]), "it says that it is client 4: gone")


def test_replies_to_other_messages_are_left_out():
    known = Round()
    first = known.ask()
    late = known.honest(first)
    known.merge([late[p] for p in (0, 1, 2, 4)])
    messages = known.ask()
    replies = known.honest(messages)
    # A reply to the round before beside one to this round, another node's reply, and one of another kind.
    assert known.merge([late[3], *replies.values()]) == merged_of(*range(CLIENTS))
    assert known.dropped == [on(DRAWN[3])]
    stolen = answered(messages[1], known.content(3), DRAWN[3])
    assert known.merge([*(replies | {3: stolen}).values()]) == merged_of(0, 1, 2, 4)
    for name, value in (("_message_type", "evaluate"), ("_group_id", "9")):
        other = answered(messages[0], known.content(0))
        other.metadata.__dict__[name] = value
        assert known.merge([*(replies | {0: other}).values()]) == merged_of(1, 2, 3, 4)
        assert known.dropped == [0]


def test_replies_without_anything_in_them_are_named():
    known = Round()
    replies = known.honest()
    replies[1].__dict__["_content"] = None
    assert known.merge(replies.values()) == merged_of(0, 2, 3, 4)
    assert known.strategy.last_report.dropped[0].reason == "its reply is empty"


def test_who_names_no_node_is_left_out_where_others_do():
    known = Round()
    replies = known.honest()
    for missing in (None, True, "2"):
        assert known.merge([*(replies | {1: from_node(replies[1], missing)}).values()]) == merged_of(0, 2, 3, 4)
        assert known.dropped == ["on an unnamed node"]
    nobody = [from_node(answer, None) for answer in replies.values()]
    assert known.merge(nobody[::-1]) == merged_of(*range(CLIENTS))
    assert known.accepted == tuple(range(CLIENTS))
    replies = [from_node(answer, None) for answer in Round(tells=False).honest().values()]
    assert known.merge(replies) is not None
    assert known.accepted == tuple(range(CLIENTS))


def test_an_error_that_flower_writes_for_a_node_is_the_nodes():
    known = Round()
    messages = known.ask()
    told = answered(messages[2], Error(3, "node unavailable"), 1)
    known.merge([told, *(r for p, r in known.honest(messages).items() if p != 2)])
    assert [(one.client, one.reason) for one in known.strategy.last_report.failed] == [
        (on(DRAWN[2]), "node unavailable")
    ]
    stranger = answered(messages[2], Error(3, "client 1: gone"), STRANGER)
    stranger.metadata.__dict__["_reply_to_message_id"] = "nobody's"
    known.merge([stranger, *known.honest(messages).values()])
    assert known.dropped == [on(STRANGER)]


class Meddling(WrappedGrid):
    """Adds replies to every exchange after training, of nodes that were not asked and of such that were."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        nodes = [m.metadata.dst_node_id for m in messages]
        found = list(self._grid.send_and_receive(messages, timeout=timeout))
        if messages and messages[0].metadata.message_type == "train" and "stage" not in messages[0].content["config"]:
            return found
        for message in found:
            if message.has_content():
                message.content["client"] = ConfigRecord({"partition-id": 0})
        twice = answered(messages[0], _spoiled(found[0].content))
        stranger = answered(messages[1], found[1].content, STRANGER)
        stolen = answered(messages[0], found[1].content, nodes[2])
        return [stranger, stolen, twice, *found, Message(Error(1, "client 1: gone"), reply_to=messages[1])][::-1]


def _spoiled(content):
    return RecordDict({**content, "metrics": MetricRecord({"num-examples": 10**6, "eval_loss": 1e9})})


@pytest.mark.parametrize("method", ["fedma", "fedavg+ridge_head", "recalibrate"])
def test_within_a_merge_only_nodes_that_were_asked_answer_and_once(method, caplog):

    norms = "recalibrate" if method == "recalibrate" else "mean"
    name = "fedavg" if method == "recalibrate" else method
    results = []
    for meddled in (False, True):
        strategy = strategy_of(name, OddModel, fraction_evaluate=0.0, batch_norm=norms)
        with SimulationGrid(odd_app(), 4) as inner:
            grid = Meddling(inner) if meddled else _Deaf(inner)
            messages = list(strategy.configure_train(1, odd_arrays(), ConfigRecord(), grid))
            arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
        results.append({n: a.data for n, a in arrays.items()})
        assert strategy.last_report.accepted == (0, 1, 2, 3)
    assert results[0] == results[1]
    told = {(one.client, one.reason.partition(",")[0]) for one in strategy.last_report.failed}
    assert (0, "its node replied 2 times") in told
    assert (on(STRANGER), "its node was not asked") in told
    assert (1, "gone") in told


class _Deaf(WrappedGrid):
    """Does not hear of client 0 after training."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        found = list(self._grid.send_and_receive(messages, timeout=timeout))
        first = messages[0].metadata.message_type == "train" and "stage" not in messages[0].content["config"]
        return found if first else [reply for reply in found if reply.metadata.src_node_id != 2]


def test_evaluations_of_strangers_and_second_ones_are_not_averaged():
    known = Round()
    sent = list(known.strategy.configure_evaluate(1, initial(), ConfigRecord(), known.grid))
    for message in sent:
        stamp(message)
    good = [answered(m, RecordDict({"metrics": _loss(p)})) for p, m in enumerate(sent)]
    want = known.strategy.aggregate_evaluate(1, good)
    assert want["eval_loss"] == pytest.approx(2.0)
    stranger = answered(sent[0], RecordDict({"metrics": _loss(1e9)}), STRANGER)
    assert known.strategy.aggregate_evaluate(1, [stranger, *good]) == want
    assert known.strategy.aggregate_evaluate(1, [*good, answered(sent[3], good[3].content)]) == want
    twice = [*good, answered(sent[4], RecordDict({"metrics": _loss(1e9)}))]
    assert known.strategy.aggregate_evaluate(1, twice)["eval_loss"] == pytest.approx(1.5)


def _loss(value):
    return MetricRecord({"num-examples": 4, "eval_loss": float(value)})


def test_what_a_grid_does_not_number_is_held_against_nobody():
    messages = Round().ask()
    sent = Sent(list(DRAWN.values()), list(messages.values()))
    replies = [from_node(reply(2, STATES[p], partition=p), node) for p, node in DRAWN.items()]
    found = heard(replies, sent)
    assert len(found.replies) == CLIENTS
    assert not found.strays
    assert from_arrays(found.replies[0][1].content["arrays"])
