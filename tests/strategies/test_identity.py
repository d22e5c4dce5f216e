"""Which client a reply is of: a partition is its node's, and everything else is named and left out."""

from __future__ import annotations

import random

import pytest
from flwr.app import Error, RecordDict

from fedmerge.errors import NoUsableUpdates
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.simulation.grids.numbered_grid import NumberedGrid
from fedmerge.simulation.workers.flower_task import become_server_task, from_node
from fedmerge.strategies import MergeStrategy
from fedmerge.strategies.identity import Identities
from fedmerge.strategies.resume import StrategyCheckpoints
from tests.federation import initial, tiny_app
from tests.identified import CLIENTS, DRAWN, STRANGER, DrawnGrid, PlainGrid, Round, answered, merged_of, on


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
    StrategyCheckpoints(tmp_path).save(1, initial(), {}, known.strategy.identities, {"seed": 3})
    past = StrategyCheckpoints(tmp_path).past({"seed": 3}, initial(), 3, watched=False)
    assert (past.round, past.identities.known) == (1, known.strategy.identities.known)


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


def test_too_few_well_identified_clients_end_a_round_with_their_names():
    known = Round(strategy=MergeStrategy("fedavg"))
    messages = known.ask()
    with pytest.raises(NoUsableUpdates, match="several nodes say that they are of partition 0") as told:
        known.merge([answered(m, known.content(p, 0)) for p, m in messages.items()])
    assert [bad.client for bad in told.value.dropped] == sorted(map(on, DRAWN.values()))
