"""Who a reply is from: a node that was asked, once, with the partition that is its own. Everything else is named."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedmerge.errors import ConfigError, NoUsableUpdates
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.exchanges import MeasuredGrid
from fedmerge.simulation.flower_task import become_server_task, from_node, stamp
from fedmerge.simulation.numbered_grid import NumberedGrid
from fedmerge.simulation.wrapped_grid import WrappedGrid
from fedmerge.strategies import FedAvg, MergeStrategy, from_arrays
from fedmerge.strategies.heard import Sent, heard
from fedmerge.strategies.identity import Identities
from fedmerge.strategies.resume import StrategyCheckpoints
from tests.federation import initial, noisy_states, reply, tiny_app

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


def test_in_any_order_the_same():
    want = merged_of(*range(CLIENTS))
    known = Round()
    replies = list(known.honest().values())
    for _ in range(5):
        random.Random(_).shuffle(replies)
        assert known.merge(replies) == want
        assert known.accepted == tuple(range(CLIENTS))
        assert not known.dropped


@pytest.mark.parametrize("claim", [None, -1, True, "1", 1.5, [1], b"1", 2**31, 2**63 - 1, DRAWN[3]])
def test_a_reply_without_a_partition_that_can_be_is_named_and_left_out(claim, caplog):
    known = Round()
    messages = known.ask()
    replies = known.honest(messages) | {1: answered(messages[1], known.content(1, claim))}
    assert known.merge(replies.values()) == merged_of(0, 2, 3, 4)
    assert known.accepted == (0, 2, 3, 4)
    assert known.dropped == [on(DRAWN[1])]
    assert f"client on node {DRAWN[1]}" in caplog.text


def test_a_partition_claimed_by_two_nodes_is_nobodys_and_costs_no_third_its_part(caplog):
    known = Round()
    messages = known.ask()
    replies = known.honest(messages) | {1: answered(messages[1], known.content(1, claim=3))}
    assert known.merge(replies.values()) == merged_of(0, 2, 4)
    assert set(known.dropped) == {on(DRAWN[1]), on(DRAWN[3])}
    assert "several nodes say that they are of partition 3" in caplog.text


def test_a_partition_claimed_by_two_nodes_is_whose_it_was_in_an_earlier_round():
    known = Round()
    known.merge(known.honest().values())
    messages = known.ask()
    replies = known.honest(messages) | {1: answered(messages[1], known.content(1, claim=3))}
    assert known.merge(replies.values()) == merged_of(0, 2, 3, 4)
    assert known.dropped == [1]
    assert "partition 1" in known.strategy.last_report.dropped[0].reason


def test_a_partition_of_a_node_that_is_silent_is_not_taken_while_it_is_connected():
    nodes = {**DRAWN, 5: 77}
    known = Round(PlainGrid(nodes), nodes)
    replies = known.honest({p: m for p, m in known.ask().items() if p != 5})
    known.merge(replies.values())
    messages = known.ask()
    late = answered(messages[5], known.content(4, claim=2))
    replies = known.honest({p: m for p, m in messages.items() if p not in (2, 5)})
    known.merge([*replies.values(), late])
    assert (known.accepted, known.dropped) == ((0, 1, 3, 4), [on(77)])
    # A node that is started anew has another id, and its old one is gone.
    known.grid.nodes[2] = 78
    known.nodes = known.grid.nodes
    messages = known.ask()
    replies = known.honest({p: m for p, m in messages.items() if p != 5})
    known.merge(replies.values())
    assert known.accepted == (0, 1, 2, 3, 4)
    # Who was there first is so again when it comes back.
    known.grid.nodes[6] = DRAWN[2]
    messages = known.ask()
    replies = known.honest({p: m for p, m in messages.items() if p < 5})
    first = answered(messages[6], known.content(3, claim=2))
    known.merge([*replies.values(), first])
    assert known.accepted == (0, 1, 2, 3, 4)
    assert known.dropped == [2]


def test_what_is_known_of_nodes_outlives_the_server(tmp_path):
    known = Round()
    known.merge(known.honest().values())
    facts = known.strategy.identities.facts()
    assert Identities.of_facts(facts).known == known.strategy.identities.known
    for broken in (None, 3, {"x": [1, 2]}, {"3": [True, 1]}, {"3": [1]}, {"3": 1}, {"3": ["1", 1]}, {"3": [1, None]}):
        assert not Identities.of_facts(broken).known
    StrategyCheckpoints(tmp_path).save(known.strategy, 1, initial())
    heard_of = []

    def started(**keywords):
        heard_of.append(later.strategy.identities.known)
        raise RuntimeError("far enough")

    later = Round()

    def start(initial_arrays, num_rounds, evaluate_fn=None):
        return started()

    with pytest.raises(RuntimeError, match="far enough"):
        StrategyCheckpoints(tmp_path).start(later.strategy, start, initial_arrays=initial(), num_rounds=3)
    assert heard_of == [known.strategy.identities.known]


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


def test_a_federation_that_tells_no_partitions_goes_by_nodes_whatever_one_client_says():
    in_order = sorted(range(CLIENTS), key=DRAWN.get)
    for claim in (None, 0, DRAWN[2], True, -1):
        known = Round(tells=False)
        for _ in range(2):
            messages = known.ask()
            replies = known.honest(messages) | {1: answered(messages[1], known.content(1, claim))}
            known.merge(replies.values())
            assert known.accepted == tuple(DRAWN[p] for p in in_order)
            assert not known.dropped
    # It stays so, also in a round in which nobody else is heard of.
    messages = known.ask()
    known.merge([answered(messages[1], known.content(1, 0))])
    assert known.accepted == (DRAWN[1],)


def test_a_federation_that_tells_partitions_never_goes_by_nodes_later():
    known = Round()
    known.merge(known.honest().values())
    messages = known.ask()
    assert known.merge([answered(messages[1], known.content(1, None))]) is None
    assert known.dropped == [1]


def test_failures_have_the_number_of_their_client_only_where_it_is_known():
    known = Round()
    known.merge(known.honest().values())
    messages = known.ask()
    failed = {1: answered(messages[1], Error(2, "client 3: no disk")), 2: answered(messages[2], Error(2, "no disk"))}
    known.merge([*(known.honest(messages) | failed).values()][:4])
    assert [(one.client, one.reason) for one in known.strategy.last_report.failed] == [
        (2, "no disk"),
        (1, "it says that it is client 3: no disk"),
        (0, "no reply"),
    ]


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


def claims(rng, known, messages, bad):
    """Replies in which `bad` clients lie about who they are, and strangers join; others are honest."""
    found, partitions = [], sorted(messages)
    for partition, message in messages.items():
        if partition not in bad:
            found.append(answered(message, known.content(partition)))
            continue
        kind = rng.randrange(8)
        other = rng.choice([p for p in partitions if p != partition])
        if kind == 0:
            claim = rng.choice([None, -3, True, "2", 2.5, 2**40, 2**63 - 1, message.metadata.dst_node_id])
            found.append(answered(message, known.content(partition, claim)))
        elif kind == 1:
            found.append(answered(message, known.content(partition, other)))
        elif kind == 2:
            found += [answered(message, known.content(partition, rng.choice([partition, other]), s)) for s in (0, 1)]
        elif kind == 3:
            found += [
                answered(message, known.content(partition, rng.randrange(99), state=s % CLIENTS)) for s in range(9)
            ]
        elif kind == 4:
            found.append(answered(messages[other], known.content(partition, other), message.metadata.dst_node_id))
        elif kind == 5:
            found.append(from_node(answered(message, known.content(partition)), rng.choice([None, STRANGER, True])))
        elif kind == 6:
            found.append(answered(message, RecordDict()))
            found[-1].__dict__["_content"] = None
        else:
            found.append(answered(message, Error(2, f"client {other}: gone")))
    for _ in range(rng.randrange(3)):
        stranger = answered(messages[rng.choice(partitions)], known.content(0, rng.randrange(CLIENTS)))
        found.append(from_node(stranger, rng.choice([STRANGER, 1, 0, -4])))
    rng.shuffle(found)
    return found


WANTED = {}


def wanted(bad):
    if bad not in WANTED:
        WANTED[bad] = merged_of(*(p for p in range(CLIENTS) if p not in bad))
    return WANTED[bad]


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


def federation(kind):
    """A round on a grid of this kind, with its nodes by partition."""
    become_server_task()
    own = {p: p + 2 for p in range(CLIENTS)}
    if kind == "simulation":
        return Round(MeasuredGrid(SimulationGrid(tiny_app(), CLIENTS)), own)
    if kind == "numbered":
        return Round(MeasuredGrid(NumberedGrid(DrawnGrid(tiny_app(), CLIENTS), CLIENTS)), own)
    known = Round()
    if kind == "known from a round before":
        known.merge(known.honest().values())
    return known


@pytest.mark.parametrize("kind", ["simulation", "numbered", "known from a round before"])
def test_whatever_clients_say_of_themselves_the_others_merge_as_without_them(kind):
    for seed in range(40):
        rng, known = random.Random(f"{kind} {seed}"), federation(kind)
        bad = frozenset(rng.sample(range(CLIENTS), rng.choice([1, 1, 2])))
        replies = claims(rng, known, known.ask(), bad)
        assert known.merge(replies) == wanted(bad), seed
        assert known.accepted == tuple(p for p in range(CLIENTS) if p not in bad)
        report = known.strategy.last_report
        named = {bad.client for bad in report.dropped} | {one.client for one in report.failed}
        assert len(named) >= len(bad)
        assert not named & set(known.accepted)


def test_without_any_knowledge_nobody_takes_a_part_that_is_not_its_own():
    lost = 0
    for seed in range(40):
        rng, known = random.Random(seed), Round()
        bad = frozenset(rng.sample(range(CLIENTS), 1))
        replies = claims(rng, known, known.ask(), bad)
        known.merge(replies)
        honest = set(range(CLIENTS)) - bad
        # A partition that is claimed by the hostile one as well is lost; one that nobody else has, it may have.
        assert len(honest - set(known.accepted)) <= 1
        lost += len(honest - set(known.accepted))
        assert len(known.accepted) <= CLIENTS
        if set(known.accepted) == honest:
            assert known.merge(replies) == wanted(bad)
    assert 0 < lost < 15


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
    from tests.answered import OddModel, odd_app, odd_arrays, strategy_of

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
    from flwr.clientapp import ClientApp

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


def test_too_few_well_identified_clients_end_a_round_with_their_names():
    known = Round(strategy=MergeStrategy("fedavg"))
    messages = known.ask()
    with pytest.raises(NoUsableUpdates, match="several nodes say that they are of partition 0") as told:
        known.merge([answered(m, known.content(p, 0)) for p, m in messages.items()])
    assert [bad.client for bad in told.value.dropped] == sorted(map(on, DRAWN.values()))


def test_what_a_grid_does_not_number_is_held_against_nobody():
    messages = Round().ask()
    sent = Sent(list(DRAWN.values()), list(messages.values()))
    replies = [from_node(reply(2, STATES[p], partition=p), node) for p, node in DRAWN.items()]
    found = heard(replies, sent)
    assert len(found.replies) == CLIENTS
    assert not found.strays
    assert from_arrays(found.replies[0][1].content["arrays"])
