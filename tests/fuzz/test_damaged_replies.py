"""Damaged replies and messages: whatever a few clients send, the others make a round, and nobody hangs or crashes."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from hypothesis import strategies as st

from fedmerge.simulation.grids.simulation_grid import SimulationGrid
from fedmerge.simulation.workers.flower_task import become_server_task, stamp
from tests.answered import Asked, answer, asked, odd_app, odd_arrays, strategy_of
from tests.fuzz.damage import Damage, damaged
from tests.fuzz.damaged_replies import REPLIES
from tests.fuzz.survey import Tries, survey, tries

QUICK = ("fedavg", "fednova", "fedatt", "median", "trimmed_mean", "krum", "norm_clipping", "median_norm_clipping",
         "fisher", "regmean", "fedavg+server_adam")  # fmt: skip
SLOW = ("geometric_median", "fedfisher", "fedfisher(variant=diag)", "mats", "pfnm", "rebasin", "otfusion", "fedlpa",
        "maecho", "gradient_matching")  # fmt: skip
CLIENTS = 5


@cache
def of_five(method: str) -> Asked:
    return Asked(method, CLIENTS)


class Extra(NamedTuple):
    """A reply more: whose it says that it is, whose content it has, and what is done to that."""

    node: int
    content: int
    changes: list[Damage]


class Round(NamedTuple):
    """What comes back in a round of five: one or two clients' replies are damaged, in any order."""

    method: str
    changes: dict[int, list[Damage]]
    extra: Extra | None
    order: list[int]


PLACES = st.integers(0, CLIENTS - 1)


def rounds(*methods: str) -> st.SearchStrategy[Round]:
    extra = st.none() | st.none() | st.none() | st.builds(Extra, st.sampled_from((0, 2, 3, 5, 99)), PLACES, REPLIES)
    changes = st.dictionaries(PLACES, REPLIES, min_size=1, max_size=2)
    return st.builds(Round, st.sampled_from(methods), changes, extra, st.permutations(range(CLIENTS + 1)))


def merge(drawn: Round) -> None:
    known = of_five(drawn.method)
    sent = known.replies([damaged(c, drawn.changes.get(i, ())) for i, c in enumerate(known.contents)])
    if drawn.extra is not None:
        node, content, changes = drawn.extra
        sent.append(answer(node, damaged(known.contents[content], changes)))
    known.strategy.memory = {}
    arrays, _ = known.strategy.aggregate_train(1, iter([sent[i] for i in drawn.order if i < len(sent)]))
    assert list(arrays) == list(known.arrays)


@tries(110, 60_000)
def test_whatever_two_clients_send_the_other_three_make_a_round(tried):
    assert survey(merge, rounds(*QUICK), tried, allowed=())["fine"]


@tries(2, 150)
@pytest.mark.parametrize("method", SLOW)
def test_whatever_two_clients_send_the_other_three_make_a_round_of_a_slow_method(method, tried):
    assert survey(merge, rounds(method), tried, allowed=())["fine"]


@tries(60, 12_000)
def test_answers_to_an_evaluation_may_be_damaged(tried):
    known = asked("fedavg")
    metrics = [RecordDict({"metrics": content["metrics"]}) for content in known.contents]

    def evaluate(changes):
        sent = known.replies([*metrics, *(damaged(metrics[0], some) for some in changes)])
        known.strategy.aggregate_evaluate(1, sent)

    assert survey(evaluate, st.tuples(REPLIES, REPLIES), tried)["fine"]


class Between:
    """A grid that damages some of what clients answer within a merge, by how many answers came before."""

    def __init__(self, inner: SimulationGrid, changes: dict[int, list[Damage]]) -> None:
        self.inner, self.changes, self.answers = inner, changes, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def send_and_receive(self, messages, **keywords):
        """Replies, some damaged."""
        replies = list(self.inner.send_and_receive(list(messages), **keywords))
        for message in replies:
            if message.has_content() and self.answers in self.changes:
                message.content = damaged(message.content, self.changes[self.answers])
            self.answers += 1
        return replies


@tries(6, 300)
def test_later_exchanges_of_a_round_may_bring_damaged_replies(tried):
    """FedMA, and batch norms measured anew."""

    def merge_in_stages(drawn: tuple[str, dict[int, list[Damage]]]):
        method, changes = drawn
        become_server_task()
        norms = "mean" if method == "fedma" else "recalibrate"
        strategy = strategy_of(method, fraction_evaluate=0.0, batch_norm=norms)
        with SimulationGrid(odd_app(), 3) as inner:
            messages = list(strategy.configure_train(1, odd_arrays(), ConfigRecord(), Between(inner, changes)))
            strategy.aggregate_train(1, inner.send_and_receive(messages))

    changes = st.dictionaries(st.integers(0, 11), REPLIES, min_size=1, max_size=4)
    assert survey(merge_in_stages, st.tuples(st.sampled_from(("fedavg", "fedma")), changes), tried)


GOOD = {"server-round": 1, "epochs": 1, "seed": 3, "needs": ["fisher_diag"], "learning-rate": 0.1, "stage": 0}
HOW_LONG = ("epochs", "steps")
"""How long a client works is the server's to say: a huge number is no fault."""
KEYS = (*GOOD, "needs-settings", "statistics-compression", "statistics-budget", "frozen", "send", "batch-norm",
        "momentum", "batch-size", "optimizer", "proximal-mu", "clip-norm", "weight-decay", "keep-model")  # fmt: skip
GARBAGE = (0, -1, 2.5, "x", b"\0", [], ["gram"], [1], ["../x"], True, float("nan"), 2**62)
WRITTEN = (['{"examples": 1e99}'], ['{"layers": 3}'], ["[" * 5000], ['{"loss": "x"}'], ["null"], ["[]"],
           ['{"samples": -1}'])  # fmt: skip


class Order(NamedTuple):
    """A message to a client."""

    kind: str
    config: dict[str, Any]
    changes: list[Damage]
    has_trained: bool


_garbage = st.dictionaries(
    st.sampled_from([key for key in KEYS if key not in HOW_LONG]), st.sampled_from(GARBAGE), max_size=3
)
_odd_lengths = st.fixed_dictionaries({"epochs": st.sampled_from(GARBAGE[:-1])})
_odd_needs = st.fixed_dictionaries(
    {"needs": st.sampled_from((["gram"], ["activations"], ["x"])), "needs-settings": st.sampled_from(WRITTEN)}
)
ORDERS = st.builds(
    Order,
    st.sampled_from(("train", "evaluate", "query.statistics")),
    _garbage | _odd_lengths | st.builds(dict.__or__, _garbage, _odd_needs),
    st.just([]) | REPLIES,
    st.booleans(),
)


@tries(100, 4500)
def test_a_client_may_get_garbage(tried):
    app = odd_app()

    def receive(order: Order):
        become_server_task()
        content = RecordDict({"arrays": odd_arrays(), "config": ConfigRecord({**GOOD, **order.config})})
        message = Message(damaged(content, order.changes), dst_node_id=2, message_type=order.kind)
        stamp(message)
        state = RecordDict({"fedmerge.model": odd_arrays()} if order.has_trained else {})
        app(message, Context(1, 2, {"partition-id": 0, "num-partitions": 3}, state, {}))

    fates = survey(receive, ORDERS, tried)
    assert fates["fine"]
    assert fates["typed"]


def test_a_failure_shrinks_to_one_reply_in_which_little_is_changed():
    seen = []

    def breaks_on_complex_numbers(drawn: Round):
        contents = [damaged(of_five("fedavg").contents[i], changes) for i, changes in drawn.changes.items()]
        arrays = [
            array for content in contents for record in content.array_records.values() for array in record.values()
        ]
        if any(array.dtype == "complex64" for array in arrays):
            seen.append(drawn)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        survey(breaks_on_complex_numbers, rounds("fedavg"), Tries(500))
    (changes,) = seen[-1].changes.values()
    assert len(changes) <= 2
    assert changes[-1].options["change"].options["dtype"] in ("c8", "complex64")
    assert (seen[-1].extra, seen[-1].order) == (None, list(range(CLIENTS + 1)))
