"""Replies that claim far more than they bring, or to be somebody else's: they cost their sender its part, no more."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from fedmerge import InvalidOption
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.workers.flower_task import become_server_task
from fedmerge.statistics.sending.compression import decode
from fedmerge.strategies import from_arrays, to_arrays
from fedmerge.wire.record_values import read_array
from tests.answered import asked, odd_app, odd_arrays, shallow, strategy_of

HUGE = 10**6
BOMBS = {
    "eigenvectors of rank 0": {
        "vectors": np.zeros((1, HUGE, 0), np.int8), "peaks": np.zeros((1, 0), np.float32),
        "left": np.zeros((1, HUGE), np.float32), "ndim": np.array(2, np.int8),
    },
    "correlations that are missing": {
        "correlation": np.zeros((1, 1), np.float16), "diagonal": np.ones((1, HUGE), np.float32),
        "ndim": np.array(2, np.int8),
    },
    "a peak for every row": {"linear": np.zeros((1, HUGE), np.int8), "peak": np.ones((HUGE, 1), np.float32)},
    "groups without end": {
        "vectors": np.zeros((HUGE, 5, 0), np.int8), "peaks": np.zeros((HUGE, 0), np.float32),
        "left": np.zeros((HUGE, 5), np.float32), "ndim": np.array(3, np.int8),
    },
}  # fmt: skip


def merged(method, contents):
    known = asked(method)
    known.strategy.memory = {}
    arrays, _ = known.strategy.aggregate_train(1, known.replies(contents))
    return known.strategy.last_report, arrays


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize(("method", "name"), [("fedfisher(variant=kfac)", "0.weight.A"), ("regmean", "0.weight")])
def test_a_packed_statistic_that_would_fill_the_memory_is_refused_unopened(bomb, method, name):
    contents = [shallow(content) for content in asked(method).contents]
    (key,) = (key for key in contents[0].array_records if key.startswith("statistics."))
    kept = {n: a for n, a in contents[0][key].items() if n.partition("#")[0] != name}
    contents[0][key] = ArrayRecord(kept | {f"{name}#{part}": Array(data) for part, data in BOMBS[bomb].items()})
    tracemalloc.start()
    report, _ = merged(method, contents)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [bad.client for bad in report.dropped] == [0]
    assert report.dropped[0].reason
    assert peak < 100 * 2**20


def test_parts_that_do_not_fit_together_are_refused():
    for parts in BOMBS.values():
        sent = {f"w#{part}": torch.from_numpy(data) for part, data in parts.items()}
        shapes = []
        with pytest.raises(InvalidOption):
            decode(sent, lambda found, shapes=shapes: shapes.append(found) or refuse(found))


def refuse(found):
    raise InvalidOption(f"too large: {found}")


def test_a_header_that_announces_a_terabyte_takes_no_memory():
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000, 1000, 1000, 1000), }".ljust(117) + b"\n"
    for version, length in ((b"\x01\x00", 2), (b"\x02\x00", 4)):
        data = b"\x93NUMPY" + version + len(header).to_bytes(length, "little") + header
        with pytest.raises(ValueError, match="8000000000000 bytes, and brings 0"):
            read_array(Array(dtype="float64", shape=(1000,) * 4, stype="numpy.ndarray", data=data))


def test_a_width_that_matching_could_not_bear_is_refused():
    contents = [shallow(content) for content in asked("pfnm").contents]
    state = from_arrays(contents[0]["arrays"])
    state = {n: t.repeat(*[400 if n == 6 else 1 for n in t.shape]) if t.ndim else t for n, t in state.items()}
    contents[0]["arrays"] = to_arrays(state)
    report, _ = merged("pfnm", contents)
    assert "32 times" in report.dropped[0].reason


def test_numbers_whose_squares_overflow_cost_the_client_its_part_and_not_the_round():
    for value in (3e38, -3e38):
        contents = [shallow(content) for content in asked("fedavg").contents]
        state = from_arrays(contents[1]["arrays"])
        state["0.weight"][0, 0] = value
        contents[1]["arrays"] = to_arrays(state)
        contents[1]["metrics"] = MetricRecord({**contents[1]["metrics"], "num-examples": 2**53})
        report, arrays = merged("fedavg", contents)
        assert "beyond 1e+15" in report.dropped[0].reason
        assert from_arrays(arrays)["0.weight"].abs().max() < 10


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64, np.complex64])
def test_kinds_of_numbers_that_cannot_be_merged_are_named(dtype):
    contents = [shallow(content) for content in asked("fedavg").contents]
    name = "0.bias" if dtype is np.complex64 else "count"
    shape = (6,) if dtype is np.complex64 else ()
    contents[0]["arrays"] = ArrayRecord({**contents[0]["arrays"], name: Array(np.ones(shape, dtype))})
    report, _ = merged("fedavg", contents)
    assert np.dtype(dtype).name in report.dropped[0].reason


class Pretending(SimulationGrid):
    """Clients that answer everything after their training in somebody else's name."""

    def send_and_receive(self, messages, **keywords):
        replies = list(super().send_and_receive(messages, **keywords))
        for number, reply in enumerate(replies):
            if reply.has_content():
                reply.content["client"] = ConfigRecord({"partition-id": 7 if number else 1})
        return replies


@pytest.mark.parametrize("method", ["fedma", "fedavg"])
def test_who_answers_within_a_merge_is_told_by_the_node_and_not_by_the_answer(method):
    become_server_task()
    strategy = strategy_of(method, fraction_evaluate=0.0, batch_norm="mean" if method == "fedma" else "recalibrate")
    with Pretending(odd_app(), 3) as grid:
        messages = list(strategy.configure_train(1, odd_arrays(), ConfigRecord(), grid))
        replies = SimulationGrid.send_and_receive(grid, messages)
        arrays, _ = strategy.aggregate_train(1, replies)
    assert strategy.last_report.accepted == (0, 1, 2)
    assert all(t.isfinite().all() for t in from_arrays(arrays).values() if t.is_floating_point())
