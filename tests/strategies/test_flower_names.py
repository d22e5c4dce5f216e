"""Our strategies under Flower's names beside Flower's own: the same replies give the same models."""

from __future__ import annotations

from unittest.mock import Mock

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

import fedmerge
from fedmerge import InvalidOption, NoUsableUpdates, UnknownName
from fedmerge import strategies as ours
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import MergeStrategy
from tests.federation import CLIENTS, initial, tiny_app

ROUNDS = 3


def mock_reply(arrays, examples=1):
    """A reply with nothing but its content: neither metadata nor a sender."""
    message = Mock(spec=Message)
    message.content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": examples})})
    message.has_error.side_effect, message.has_content.side_effect = lambda: False, lambda: True
    return message


ADAPTIVE = ("FedAdam", "FedYogi", "FedAdagrad")


def options(name, draw, clients, exact):
    """Options that both take, drawn anew for every federation.

    Adaptive steps magnify what is left of rounding by eta / tau, Flower's in float32 as well as ours.
    """
    hostile = int(draw.integers(0, max(1, clients // 2)))
    if name in ADAPTIVE:
        chosen = {"eta": float(draw.choice([0.01, 0.1])), "tau": float(draw.choice([1e-3, 0.1])) if exact else 0.1}
        if name != "FedAdagrad":
            chosen |= {"beta_1": float(draw.choice([0.0, 0.9])), "beta_2": float(draw.choice([0.5, 0.99]))}
        return chosen
    known = {
        "FedTrimmedAvg": {"beta": float(draw.choice([0.0, 0.1, 0.2, 0.25, 0.3, 0.49]))},
        "FedAvgM": {
            "server_learning_rate": float(draw.choice([0.3, 1.0, 1.2])),
            "server_momentum": float(draw.choice([0.0, 0.5, 0.9])),
        },
        "Krum": {"num_malicious_nodes": hostile},
        "MultiKrum": {"num_malicious_nodes": hostile, "num_nodes_to_select": int(draw.integers(1, clients + 1))},
    }
    return known.get(name, {})


def model(draw, exact):
    """Parameters of all kinds of shapes, a single number among them; at several scales in float64, for in float32
    Flower's distances between large models are rounding error."""
    shapes = [(), (1,), *(tuple(draw.integers(1, 6, draw.integers(1, 4))) for _ in range(draw.integers(1, 4)))]
    scale, dtype = (float(draw.choice([1e-3, 1.0, 1e3])), "float64") if exact else (1.0, "float32")
    return {
        f"layer{i}.weight": np.asarray(scale * draw.standard_normal(shape), dtype) for i, shape in enumerate(shapes)
    }


def apart(one, other):
    """The largest difference, of numbers above 1 in relation to them."""
    return max(
        float(np.max(np.abs(array.numpy() - other[name].numpy()) / np.maximum(1.0, np.abs(other[name].numpy()))))
        for name, array in one.items()
    )


def largest_difference(name, seed):
    """Three rounds of one federation, from the same replies."""
    draw = np.random.default_rng([seed, len(name)])
    clients, exact = int(draw.integers(3, 13)), seed % 2 == 0
    start, chosen = model(draw, exact), options(name, draw, clients, exact)
    # No message goes out: what clients reply is at hand.
    mine, theirs = (getattr(package, name)(**chosen, fraction_train=0.0) for package in (ours, flower))
    arrays = {one: ArrayRecord({n: Array(a) for n, a in start.items()}) for one in (mine, theirs)}
    worst = 0.0
    for round in range(1, ROUNDS + 1):
        sent = {n: a.numpy() for n, a in arrays[theirs].items()}
        spread = float(draw.choice([1e-2, 0.3])) if exact else 0.3
        states = [
            {n: np.asarray(a + spread * draw.standard_normal(a.shape), start[n].dtype) for n, a in sent.items()}
            for _ in range(clients)
        ]
        examples = [int(n) for n in draw.integers(1, 500, clients)]
        for one in (mine, theirs):
            list(one.configure_train(round, arrays[one], ConfigRecord(), Mock(spec=Grid)))
            replies = [
                mock_reply(ArrayRecord({n: Array(a) for n, a in state.items()}), number)
                for state, number in zip(states, examples, strict=True)
            ]
            arrays[one] = one.aggregate_train(round, replies)[0]
        worst = max(worst, apart(arrays[mine], arrays[theirs]))
        assert {a.shape for a in arrays[mine].values()} == {a.shape for a in start.values()}
        assert {a.numpy().dtype for a in arrays[mine].values()} == {a.dtype for a in start.values()}
    return worst


@pytest.mark.parametrize("federations", [10, pytest.param(60, marks=pytest.mark.study)])
@pytest.mark.parametrize(
    "name", ["FedAvg", "FedMedian", "FedTrimmedAvg", "FedAvgM", "Krum", "MultiKrum", "FedProx", *ADAPTIVE]
)
def test_random_federations_give_flowers_models(name, federations):
    worst = {seed: largest_difference(name, seed) for seed in range(federations)}
    assert max(worst.values()) < 1e-6, max(worst, key=worst.get)


def test_scalars_stay_scalars_and_doubles_stay_exact():
    sent = [ArrayRecord([np.array(value)]) for value in (0.2, 0.5, 1.0)]
    mean = np.mean([0.2, 0.5, 1.0])
    wanted = {"FedAvg": mean, "FedMedian": 0.5, "FedTrimmedAvg": mean, "Krum": 0.2}
    for name, value in wanted.items():
        arrays, _ = getattr(ours, name)().aggregate_train(1, [mock_reply(record) for record in sent])
        (array,) = arrays.to_numpy_ndarrays()
        assert (array.shape, array.dtype) == ((), np.float64)
        assert array == value


@pytest.mark.parametrize("method", ["fedavg", "median", "trimmed_mean", "fedatt", "geometric_median"])
def test_replies_need_no_more_than_content(method):
    """Mocks and other grids need not say who sent a reply: then the order of arrival counts."""
    strategy = MergeStrategy(method)
    list(strategy.configure_train(1, initial(), ConfigRecord(), SimulationGrid(tiny_app(), CLIENTS)))
    arrays, metrics = strategy.aggregate_train(1, [mock_reply(initial(), n) for n in (1, 2, 3)])
    assert list(arrays) == list(initial())
    assert strategy.last_report.accepted == (0, 1, 2)
    assert dict(metrics) == {}


def test_an_error_reply_without_a_sender_is_left_out():
    failed = Mock(spec=Message)
    failed.error, failed.has_error.side_effect = Error(code=2, reason="boom"), lambda: True
    strategy = ours.FedMedian()
    arrays, _ = strategy.aggregate_train(1, [failed, mock_reply(ArrayRecord([np.ones(2)]))])
    assert arrays["0"].numpy().tolist() == [1, 1]
    with pytest.raises(fedmerge.ClientFailed, match="boom"):
        ours.FedMedian(on_client_error="raise").aggregate_train(1, [failed])


def test_krum_in_flowers_form_takes_three_replies_with_one_attacker_and_the_papers_refuses():
    replies = [mock_reply(ArrayRecord([np.full(4, value)]), 5) for value in (0.2, 0.7, 1.0)]
    arrays, _ = ours.Krum(num_malicious_nodes=1).aggregate_train(1, replies)
    np.testing.assert_array_equal(arrays["0"].numpy(), np.full(4, 0.7))
    paper = MergeStrategy("krum", attackers=1)
    assert paper.aggregate_train(1, replies) == (None, None)
    assert "at least 5" in paper.last_report.skipped


def test_multi_krum_in_flowers_form_weighs_by_examples():
    replies = [mock_reply(ArrayRecord([np.array([value])]), n) for value, n in ((0.0, 1), (1.0, 3), (9.0, 1))]
    (one,) = ours.MultiKrum(num_nodes_to_select=2).aggregate_train(1, replies)[0].to_numpy_ndarrays()
    (vote,) = MergeStrategy("krum", attackers=0, selected=2).aggregate_train(1, replies)[0].to_numpy_ndarrays()
    assert (one.item(), vote.item()) == (0.75, 0.5)


def test_what_fedavgm_steps_from_and_how_far_may_be_set_between_rounds():
    strategy = ours.FedAvgM()
    strategy.current_arrays = ArrayRecord([np.zeros(2)])
    strategy.server_learning_rate, strategy.server_momentum = 0.5, 0.25
    for wanted in (2.0, 2.5):  # half of 4, then half of (4 / 4 + 4), still from zero
        arrays, _ = strategy.aggregate_train(1, [mock_reply(ArrayRecord([np.full(2, 4.0)]))])
        np.testing.assert_array_equal(arrays["0"].numpy(), np.full(2, wanted))
    assert strategy.current_arrays["0"].numpy().tolist() == [0, 0]
    with pytest.raises(InvalidOption, match="momentum"):
        strategy.server_momentum = 1.0


def test_replies_of_another_model_are_refused_with_the_tensor_and_its_shapes():
    strategy = ours.FedAdam()
    strategy.current_arrays = {"a": np.zeros((7, 3))}
    other_shape = {"a": np.zeros((7, 5))}, r"'a' has shape \[7, 5\], the model has \[7, 3\]"
    for record, said in (other_shape, ({"b": np.ones(1)}, "'a' is missing")):
        with pytest.raises(NoUsableUpdates, match=said):
            strategy.aggregate_train(1, [mock_reply(ArrayRecord({n: Array(a) for n, a in record.items()}))])


def test_misspelt_options_and_values_out_of_range_are_named():
    with pytest.raises(UnknownName, match="fraction_train"):
        ours.FedMedian(fraction_trian=0.5)
    out_of_range = {"FedTrimmedAvg": {"beta": 0.5}, "FedAdam": {"beta_1": 1.0}, "Krum": {"num_malicious_nodes": -1}}
    for name, wrong in out_of_range.items():
        with pytest.raises(InvalidOption):
            getattr(ours, name)(**wrong)
