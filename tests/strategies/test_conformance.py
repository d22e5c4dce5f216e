"""What any Flower strategy of ours does with whatever replies come: every registered method gets what depends on it.

A method is excused from a line only with a reason in words, in the table below.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, Strategy

import fedmerge
from fedmerge import FedMergeError, NoUsableUpdates
from fedmerge.merging import build_pipeline
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import from_arrays, to_arrays
from fedmerge.strategies.policies import RoundPolicies
from tests.answered import METHODS, OddModel, answer, asked, odd_app, odd_arrays, shallow, strategy_of
from tests.federation import CLIENTS

GROWS = "layers grow, which the clipping of Flower's wrapper cannot subtract from the model sent"
MEASURES = "Flower's wrapper clips every record of a reply, what clients measured too"
ASKS_AGAIN = "clients are asked again within a merge, past the wrapper"
EXCUSED: dict[str, dict[str, str]] = {
    "privacy": {
        **{name: GROWS for name, info in fedmerge.methods().items() if info.may_change_width},
        **{name: MEASURES for name, info in fedmerge.methods().items() if info.needs},
        **{name: ASKS_AGAIN for name in fedmerge.methods() if build_pipeline(name).refinements},
        "fedma": ASKS_AGAIN,
    },
}


def every(line: str = ""):
    """Every registered method, but for those excused from this line."""
    excused = EXCUSED.get(line, {})
    marks = {name: [pytest.mark.skip(reason=reason)] for name, reason in excused.items()}
    return pytest.mark.parametrize("method", [pytest.param(name, marks=marks.get(name, [])) for name in METHODS])


KINDS = ("fedavg", "fisher", "median", "rebasin", "fedma", "fedkfac")
"""One that adds replies up as they come, one with statistics, one that collects, one that knows the model, one that has
clients train on within a merge, one that asks them again: for what is done with replies before any method sees them."""
of_each_kind = pytest.mark.parametrize("method", KINDS)


def merged(method, replies, round=1):
    """What a strategy that has sent the model makes of replies."""
    strategy = asked(method).strategy
    strategy.memory = {}
    arrays, metrics = strategy.aggregate_train(round, replies)
    return strategy, arrays, metrics


def same(one, two):
    return list(one) == list(two) and all(one[n].data == two[n].data for n in one)


@of_each_kind
def test_error_replies_are_left_out_wherever_they_stand_and_a_generator_will_do(method):
    known = asked(method)
    failed = answer(2, Error(code=2, reason="boom"))
    _, want, metrics = merged(method, known.replies())
    again = known.replies()[::-1]
    strategy, got, told = merged(method, (m for m in [failed, *again, failed]))
    assert same(got, want)
    assert dict(told) == pytest.approx(dict(metrics))
    assert len(strategy.last_report.accepted) == CLIENTS


@of_each_kind
def test_nothing_but_errors_or_nothing_at_all_keeps_the_model_or_ends_the_run(method):
    failed = answer(2, Error(code=2, reason="boom"))
    strategy = asked(method).strategy
    for policy in ("skip", "raise"):
        strategy.policies = RoundPolicies(on_too_few=policy)
        for replies in ([failed, failed], iter([failed]), [], iter([])):
            if policy == "skip":
                assert merged(method, replies)[1:] == (None, None)
            else:
                with pytest.raises(NoUsableUpdates, match=r"client on node 2 failed: (boom|no reply)") as told:
                    merged(method, replies)
                assert len(told.value.failed) == CLIENTS  # those who did not reply at all, too
            assert len(strategy.last_report.failed) == CLIENTS
    assert asked(method).strategy.aggregate_evaluate(1, []) is None
    assert asked(method).strategy.aggregate_evaluate(1, iter([failed])) is None


@every()
def test_names_order_dtypes_and_odd_shapes_are_those_of_the_model_sent(method):
    start = from_arrays(odd_arrays())
    _, arrays, _ = merged(method, asked(method).replies())
    state = from_arrays(arrays)
    assert list(state) == list(start)
    assert {n: t.dtype for n, t in state.items()} == {n: t.dtype for n, t in start.items()}
    assert {n: t.ndim for n, t in state.items()} == {n: t.ndim for n, t in start.items()}
    assert state["empty"].shape == (0, 3)
    assert state["count"] == start["count"]
    assert state["1.num_batches_tracked"] >= 4  # the client with most batches, and any stages
    assert state["0.weight"].isfinite().all()


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((name, torch.bfloat16) for name in METHODS), *product(KINDS, (torch.float16, torch.float64))],
)
def test_a_model_of_another_precision_keeps_it(method, dtype):
    def cast(record):
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in from_arrays(record).items()}
        return to_arrays(state)

    known = asked(method)
    strategy = strategy_of(method, fraction_evaluate=0.0)
    strategy.configure_train(1, cast(known.arrays), ConfigRecord(), known.grid)
    contents = [shallow(content) for content in known.contents]
    for content in contents:
        content["arrays"] = cast(content["arrays"])
    arrays, _ = strategy.aggregate_train(1, known.replies(contents))
    state = from_arrays(arrays)
    assert {t.dtype for n, t in state.items() if t.is_floating_point()} == {dtype}
    assert state["count"].dtype == torch.int64
    assert state["seen"].dtype == torch.bool


@of_each_kind
def test_further_metrics_and_foreign_message_types_do_no_harm(method):
    known = asked(method)
    _, want, _ = merged(method, known.replies())
    contents = [shallow(content) for content in known.contents]
    contents[1]["metrics"]["extra"] = 3.5
    contents[2]["notes"] = ConfigRecord({"note": "hello"})
    known.remind()
    nodes = list(known.grid.get_node_ids())
    replies = [answer(node, content, "query.other") for node, content in zip(nodes, contents, strict=True)]
    strategy, got, metrics = merged(method, replies)
    assert same(got, want)
    assert len(strategy.last_report.accepted) == CLIENTS
    assert "extra" not in metrics  # two of three did not tell it
    assert "train_loss" in metrics


def _forged(array, **changes):
    told = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
    return Array(**{**told, **changes})


def _claims(shape):
    header = str({"descr": "<f4", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


FORGERIES = {
    "announced as another dtype": lambda a: _forged(a, dtype="float64"),
    "announced in another shape": lambda a: _forged(a, shape=(10**12,)),
    "truncated": lambda a: _forged(a, data=a.data[:-1]),
    "too long": lambda a: _forged(a, data=a.data + b"\0\0\0\0"),
    "empty": lambda a: _forged(a, data=b""),
    "no NumPy": lambda a: _forged(a, data=b"\x80\x04]q\x00."),
    "an archive": lambda a: _forged(a, data=b"PK\x03\x04" + bytes(64)),
    "another kind": lambda a: _forged(a, stype="pickle"),
    "a terabyte": lambda a: _forged(a, shape=(10**12,), data=_claims((10**12,))),
    "negative": lambda a: _forged(a, shape=(-6, -4), data=_claims((-6, -4)) + bytes(96)),
    "beyond all integers": lambda a: _forged(a, data=_claims((0, 10**40))),
    "objects": lambda a: _forged(a, dtype="object", data=a.data.replace(b"<f4", b"|O ", 1)),
    "of the other byte order": lambda a: _forged(a, dtype=">f4", data=a.data.replace(b"<f4", b">f4", 1)),
}


@every()
def test_forged_arrays_cost_the_client_its_part_and_the_round_nothing(method):
    """All forgeries at once would leave nothing to merge, so they come one by one beside two good replies.

    Arrays are read before any method sees them: every kind of forgery is for two methods, one of them for each.
    """
    known = asked(method)
    names = FORGERIES if method in KINDS[:2] else ["a terabyte"]
    for name, forge in ((name, FORGERIES[name]) for name in names):
        contents = [shallow(content) for content in known.contents]
        arrays = dict(contents[0]["arrays"])
        weight = "0.weight" if "0.weight" in arrays else "3.weight"  # some rules have clients hold the first still
        arrays[weight] = forge(arrays[weight])
        contents[0]["arrays"] = ArrayRecord(arrays)
        strategy, got, _ = merged(method, known.replies(contents))
        assert [bad.client for bad in strategy.last_report.dropped] == [0], name
        assert "cannot be decoded" in strategy.last_report.dropped[0].reason, name
        assert from_arrays(got)["0.weight"].isfinite().all()


@of_each_kind
def test_absurd_numbers_of_examples_are_named(method):
    known = asked(method)
    for number in (float("nan"), float("inf"), -1, 0, 0.0, 10**30, [3]):
        contents = [shallow(content) for content in known.contents]
        for content in contents:
            content["metrics"]["num-examples"] = number
        with pytest.raises(NoUsableUpdates, match="number"):
            merged(method, known.replies(contents))


@of_each_kind
def test_who_claims_the_partition_of_another_node_is_left_out(method, caplog):
    known = asked(method)
    contents = [shallow(content) for content in known.contents]
    contents[2]["client"] = ConfigRecord({"partition-id": 0})
    strategy, _, _ = merged(method, known.replies(contents))
    assert strategy.last_report.accepted == (0, 1)
    assert [bad.client for bad in strategy.last_report.dropped] == [2]
    assert "client 2: it says that it is of partition 0, and its node is of partition 2" in caplog.text


class Wrapper(Strategy):
    """A strategy of somebody's own around another one, with nothing but Flower's interface."""

    def __init__(self, inner):
        self.inner, self.seen = inner, []

    def configure_train(self, server_round, arrays, config, grid):
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        self.seen.append(server_round)
        return self.inner.aggregate_train(server_round, (reply for reply in replies))

    def configure_evaluate(self, server_round, arrays, config, grid):
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round, replies):
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self):
        self.inner.summary()


@of_each_kind
def test_evaluation_can_be_off_and_a_wrapper_changes_nothing(method):
    results = []
    for wrap in (lambda inner: inner, Wrapper):
        strategy = wrap(strategy_of(method, fraction_evaluate=0.0))
        with SimulationGrid(odd_app(), CLIENTS) as grid:
            results.append(strategy.start(grid, odd_arrays(), num_rounds=1))
    bare, wrapped = results
    assert strategy.seen == [1]
    assert not bare.evaluate_metrics_clientapp
    one, two = from_arrays(bare.arrays), from_arrays(wrapped.arrays)
    assert list(one) == list(two) == list(OddModel().state_dict())
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)


@every("privacy")
def test_flowers_privacy_wrapper_goes_around_it(method):
    def started(wrap):
        from tests.federation import initial, plain_model, tiny_app

        with SimulationGrid(tiny_app(model_fn=plain_model), CLIENTS) as grid:
            strategy = strategy_of(method, plain_model, fraction_evaluate=0.0)
            return from_arrays(wrap(strategy).start(grid, initial(plain_model), num_rounds=1).arrays)

    def private(inner):
        return DifferentialPrivacyServerSideFixedClipping(
            inner, noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=CLIENTS
        )

    bare, wrapped = started(lambda inner: inner), started(private)
    torch.testing.assert_close(wrapped["0.weight"], bare["0.weight"], rtol=1e-3, atol=1e-4)


@of_each_kind
def test_a_metric_of_one_client_does_not_spoil_the_evaluation_of_all(method):
    strategy = asked(method).strategy
    good = [answer(node, _metrics(eval_loss=0.5 * node)) for node in (2, 4)]
    bad = [
        answer(6, _metrics(eval_loss=[1.0, 2.0])),
        answer(8, _metrics(other=1.0)),
        answer(10, _metrics(eval_loss=1.0, examples=float("nan"))),
        answer(12, _metrics(eval_loss=1.0, examples=-5)),
        answer(14, type(_metrics())()),
    ]
    assert dict(strategy.aggregate_evaluate(1, iter([*bad, *good]))) == pytest.approx({"eval_loss": 1.5})


def _metrics(examples=4, **values):
    from flwr.app import RecordDict

    return RecordDict({"metrics": MetricRecord({"num-examples": examples, **values})})


@pytest.mark.parametrize("line", EXCUSED)
def test_excuses_are_of_methods_that_there_are(line):
    assert set(EXCUSED[line]) <= set(fedmerge.methods())
    assert all(len(reason) > 20 for reason in EXCUSED[line].values())
    assert set(METHODS) - set(EXCUSED[line])
    assert issubclass(NoUsableUpdates, FedMergeError)
