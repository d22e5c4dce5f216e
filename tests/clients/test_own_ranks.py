"""Federations of adapters: only they travel, at the clients' own ranks, and everybody starts from one update."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedmerge.adapters import Adapters, OwnRanks, find_pairs, lora, scalings
from fedmerge.errors import AdapterError, InvalidOption
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.simulation.runs.config import make_config
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, to_arrays
from tests.federation import CLIENTS, TRAINING, plain_model, tiny_data

RANKS = OwnRanks((1, 3), (2.0, 6.0))


def adapted():
    return Adapters(RANKS).put_into(plain_model(), seed=1)


def run(method, model_fn=adapted, own_ranks=RANKS, rounds=1, **settings):
    app = client_app(model_fn, tiny_data, training=TRAINING, own_ranks=own_ranks)
    strategy = MergeStrategy(method, model_fn=model_fn, fraction_evaluate=0.0, **settings)
    with SimulationGrid(app, CLIENTS) as simulated:
        grid = MeasuredGrid(simulated)
        result = strategy.start(grid, to_arrays(model_fn().state_dict()), num_rounds=rounds)
    return from_arrays(result.arrays), grid.exchanges, strategy


def test_only_adapters_travel_at_the_ranks_of_the_clients():
    state, exchanges, strategy = run("flexlora")
    assert strategy.last_report.accepted == (0, 1, 2)
    start = adapted().state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, start[name]) == ("lora" not in name), name
    # Of two layers, [6, 4] and [3, 6], a slice is 4 + 6 and 6 + 3 numbers; clients have ranks 1, 3 and 1.
    whole = sum(tensor.numel() for name, tensor in start.items() if "lora" in name)
    assert whole == 3 * (10 + 9)
    _, everybody, _ = run("flexlora", own_ranks=OwnRanks((3,), (6.0,)))
    saved = sum(one.bytes_up for one in everybody) - sum(one.bytes_up for one in exchanges)
    assert saved == pytest.approx(4 * 2 * 2 * (10 + 9), abs=80)  # besides what shapes in headers cost


def test_a_client_starts_from_the_update_that_it_was_sent():
    """Whatever its alpha; and of a smaller rank from the first slices of it."""
    model, x = adapted().eval(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    for ranks in (OwnRanks((3,), (1.0,)), OwnRanks((3,), (24.0,), rank_stabilized=True)):
        own = copy.deepcopy(model)
        ranks.cut(own, 5)
        torch.testing.assert_close(own(x), model(x), rtol=1e-5, atol=1e-5)
        assert set(scalings(own).values()) != set(scalings(model).values())
    own = copy.deepcopy(model)
    OwnRanks((2,), (4.0,)).cut(own, 0)
    for pair in find_pairs(model.state_dict()):
        (b, a), (b0, a0) = pair.factors(own.state_dict()), pair.factors(model.state_dict())
        torch.testing.assert_close(b @ a * 2.0, b0[:, :2] @ a0[:2] * 2.0)
        assert not b[:, 2:].any()
        assert not a[2:].any()


def test_slices_beyond_a_clients_rank_are_not_trained():
    sent = {}

    def kept(state, base, client, round):
        sent[client] = {name: tensor.clone() for name, tensor in state.items()}
        return state

    app = client_app(adapted, tiny_data, training=TRAINING, own_ranks=RANKS, tamper=kept)
    strategy = MergeStrategy("flexlora", model_fn=adapted, fraction_evaluate=0.0)
    with SimulationGrid(app, CLIENTS) as grid:
        strategy.start(grid, to_arrays(adapted().state_dict()), num_rounds=2)
    for client, rank in enumerate((1, 3, 1)):
        for pair in find_pairs(sent[client], lenient=True):
            b, a = pair.factors(sent[client])
            assert not b[:, rank:].any()
            assert not a[rank:].any()
            assert b[:, :rank].any(0).all()


def test_the_clients_scalings_count_in_the_merge():
    """Clients of alpha 2 and 6 at ranks 1 and 3 have one scaling; with others the merge is another."""
    _, _, strategy = run("flexlora")
    (aggregator,) = [strategy.pipeline.aggregator]
    assert [need.name for need in aggregator.needs] == ["adapter_scaling"]
    one, _, _ = run("flexlora", own_ranks=OwnRanks((3,), (6.0, 3.0)))
    two, _, _ = run("flexlora", own_ranks=OwnRanks((3,), (6.0,)))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_a_model_of_another_seed_is_refused_for_its_base():
    def other():
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return lora(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), 3, 6.0)

    app = client_app(other, tiny_data, training=TRAINING)
    strategy = MergeStrategy(
        "fedit", model_fn=adapted, fraction_evaluate=0.0, on_client_error="raise", send_frozen="never"
    )
    with SimulationGrid(app, CLIENTS) as grid, pytest.raises(Exception, match=r"frozen tensor '0\.base_layer\.\w+'"):
        strategy.start(grid, to_arrays(adapted().state_dict()), num_rounds=1)


def test_ranks_that_cannot_be_are_refused():
    with pytest.raises(InvalidOption, match="rank of an adapter"):
        OwnRanks((0,), (1.0,))
    with pytest.raises(InvalidOption, match="at least one rank"):
        OwnRanks((), (1.0,))
    with pytest.raises(AdapterError, match="at rank 4, and the model's pair there has rank 3"):
        OwnRanks((4,), (1.0,)).cut(adapted(), 0)
    with pytest.raises(InvalidOption, match="own_ranks must be"):
        client_app(adapted, tiny_data, own_ranks=(1, 2))


def test_a_configuration_gives_the_model_adapters_and_clients_their_ranks():
    lines = {"model": {"name": "logistic", "lora": {"rank": [1, 2], "alpha": [2, 8]}}, "partition": {"clients": 2}}
    experiment = Experiment(make_config(lines), 0)
    state = experiment.model_fn().state_dict()
    assert {pair.rank(state) for pair in find_pairs(state)} == {2}
    assert experiment.client_app().client.own_ranks.of(0) == (1, 2.0)
    assert set(scalings(experiment.model_fn()).values()) == {4.0}
    lines["model"]["lora"] = {"rank": 2}
    assert Experiment(make_config(lines), 0).client_app().client.own_ranks is None
    with pytest.raises(InvalidOption, match="rank of an adapter"):
        make_config({"model": {"lora": {"rank": [4, 0]}}})
