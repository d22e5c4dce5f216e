"""What the pipeline adds to an aggregator: streaming, dtypes of the base, buffers by name, checks."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
import torch

from fedmerge import BadUpdate, ClientUpdate, FedMergeError, InvalidOption, MergeContext, NoUsableUpdates, UnknownName
from fedmerge.aggregators import Aggregator
from fedmerge.merging import Pipeline, build_pipeline


def update(client, value, weight=1.0, **statistics):
    return ClientUpdate(client, {"w": torch.full((3,), float(value))}, weight, statistics)


BASE = MergeContext(base={"w": torch.zeros(3)})


@pytest.mark.parametrize("method", ["fedavg", "fednova", "fedatt"])
def test_a_stream_of_clients_is_never_all_in_memory(method):
    alive, most = [], 0

    def stream():
        nonlocal most
        for client in range(8):
            tensor = torch.full((3,), float(client))
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
            yield ClientUpdate(client, {"w": tensor}, 1.0, {"local_steps": {"local_steps": torch.tensor(2)}})
            del tensor

    result = build_pipeline(method).merge(stream(), BASE)
    assert result.accepted == tuple(range(8))
    assert most <= 2  # the one that comes and the one that goes


@pytest.mark.parametrize("method", ["fedavg", "fedatt", "fedavg+server_momentum"])
def test_the_result_has_the_dtype_of_the_base_whatever_clients_send(method):
    base = {"w": torch.zeros(3, dtype=torch.float16), "n": torch.tensor(0, dtype=torch.int32)}
    sent = [
        ClientUpdate(0, {"w": torch.ones(3), "n": torch.tensor(4)}),
        ClientUpdate(1, {"w": torch.ones(3, dtype=torch.float64), "n": torch.tensor(7, dtype=torch.int16)}),
    ]
    state = build_pipeline(method).merge(sent, MergeContext(base=base)).state
    assert {name: t.dtype for name, t in state.items()} == {"w": torch.float16, "n": torch.int32}
    assert state["n"].item() == 7


def test_a_buffer_that_is_named_is_averaged_and_not_attended_to():
    base = {"w": torch.zeros(2), "table": torch.zeros(2)}
    sent = [ClientUpdate(i, {n: torch.full((2,), v) for n in base}) for i, v in enumerate((1.0, 9.0))]
    told = build_pipeline("fedatt").merge(sent, MergeContext(base=base), buffers={"table"}).state
    assert told["table"].tolist() == [5.0, 5.0]
    assert told["w"].tolist() != [5.0, 5.0]
    untold = build_pipeline("fedatt").merge(sent, MergeContext(base=base)).state
    assert torch.equal(untold["table"], untold["w"])


def test_without_a_base_the_majority_decides_what_a_model_is():
    odd = ClientUpdate(0, {"w": torch.zeros(4)})
    result = build_pipeline("fedavg").merge([odd, update(1, 2), update(2, 4)], MergeContext())
    assert result.state["w"].tolist() == [3.0, 3.0, 3.0]
    assert [bad.client for bad in result.dropped] == [0]
    assert "[4]" in result.dropped[0].reason


def test_what_could_not_be_decoded_is_listed_too():
    result = build_pipeline("fedavg").merge([update(2, 3), BadUpdate(1, "is no model", "Send one.")], BASE)
    assert result.accepted == (2,)
    assert [(bad.client, bad.reason) for bad in result.dropped] == [(1, "is no model")]
    with pytest.raises(NoUsableUpdates, match="no update"):
        build_pipeline("fedavg").merge([BadUpdate(1, "is no model", "Send one.")], MergeContext())


@dataclass(frozen=True)
class Forgets(Aggregator):
    """Divides nothing by nothing."""

    def merge(self, updates, context, memory):
        return {name: (tensor - tensor) / 0 for update in updates for name, tensor in update.state.items()}, {}


def test_nan_that_a_method_makes_of_finite_updates_is_an_error_that_names_the_tensor():
    with pytest.raises(FedMergeError, match=r"Forgets gave NaN in 'w' from finite updates"):
        Pipeline(Forgets()).merge([update(0, 1)], BASE)


def test_a_client_whose_numbers_would_overflow_the_sums_is_dropped_and_named():
    result = build_pipeline("fedavg").merge([update(0, 2.0), update(1, 3e38, 10.0)], BASE)
    assert result.accepted == (0,)
    assert "3e+38" in result.dropped[0].reason
    assert result.state["w"].unique().tolist() == [2.0]


@pytest.mark.parametrize("method", ["fedatt", "fedavg+server_momentum(learning_rate=1.2)"])
def test_results_that_overflow_the_models_dtype_are_cut_to_what_it_holds(method, caplog):
    start, sent = (torch.full((2,), v, dtype=torch.float16) for v in (50_000.0, 65_000.0))
    merged = build_pipeline(method).merge([ClientUpdate(0, {"w": sent})], MergeContext(base={"w": start}))
    assert merged.state["w"].tolist() == [65504.0, 65504.0]
    assert merged.accepted == (0,)
    assert "'w' left the range" in caplog.text


@pytest.mark.parametrize("method", ["fednova", "fedatt", "fedavg+server_adam"])
def test_methods_that_need_a_base_say_so(method):
    steps = {"local_steps": {"local_steps": 3}}
    with pytest.raises(InvalidOption, match="pass base="):
        build_pipeline(method).merge([update(0, 1, **steps)], MergeContext())


@dataclass(frozen=True)
class Remembers(Aggregator):
    """Counts rounds in its memory."""

    def merge(self, updates, context, memory):
        (only,) = updates
        count = memory.get("count", torch.tensor(0)) + 1
        return {n: t + count for n, t in only.state.items()}, {"count": count}


def test_memory_is_handed_from_round_to_round_and_parts_keep_theirs_apart():
    pipeline = Pipeline(Remembers(), build_pipeline("fedavg+server_momentum").server_steps)
    memory = None
    for round in (1, 2, 3):
        result = pipeline.merge([update(0, 0)], BASE, memory)
        memory = result.memory
        assert set(memory) == {"aggregator/count", "step0/w"}
        assert memory["aggregator/count"].item() == round
    # velocities 1, 2 + 0.9 * 1, 3 + 0.9 * 2.9 from a base that stays
    assert result.state["w"].tolist() == pytest.approx([5.61] * 3)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: build_pipeline("fedavg", on_bad_update="ignore"), InvalidOption, "'ignore'"),
        (lambda: build_pipeline("fedavg", min_updates=0), InvalidOption, "min_updates must be at least 1"),
        (lambda: build_pipeline("fedavg", batch_norm="max"), InvalidOption, "'max'"),
        (lambda: build_pipeline("fedavg+server_adm"), UnknownName, "Did you mean 'server_adam'"),
        (lambda: build_pipeline("server_adam"), UnknownName, "unknown method 'server_adam'"),
        (
            lambda: build_pipeline("fedavg+fednova"),
            UnknownName,
            "unknown server step, refinement or trajectory 'fednova'",
        ),
    ],
)
def test_mistakes_are_named(make, kind, words):
    with pytest.raises(kind) as caught:
        make()
    assert words in str(caught.value)


def test_options_reach_the_part_they_are_for():
    pipeline = build_pipeline("fedatt+server_adam", {"fedatt": {"step_size": 0.5}, "server_adam": {"tau": 0.25}})
    assert pipeline.aggregator.step_size == 0.5
    assert pipeline.server_steps[0].tau == 0.25
