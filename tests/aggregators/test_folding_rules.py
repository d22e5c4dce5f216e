"""Rules that add to the base: pairs and base together are exactly the mean of the updates, on both sides."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge import MergeContext
from fedmerge.adapters import Adapters, OwnRanks, find_pairs
from fedmerge.adapters.folded_base import moved_weights
from fedmerge.errors import AdapterError, InvalidOption
from fedmerge.layout import Layout
from fedmerge.merging import build_pipeline
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.state import prefixed
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, to_arrays
from tests.adapters.pair_cases import RANKS, SCALINGS, SHAPES, base_state, clients, mean_update, pair_state, product
from tests.federation import CLIENTS, TRAINING, plain_model, tiny_data

METHODS = ("flora", "fedex_lora")
RANK = 3


def start_state():
    return {**base_state(), **pair_state(RANK, 50)}


def merged(method, sent, start=None, memory=None, round=1):
    start = start or start_state()
    trained = tuple(name for name in start if "base_layer" not in name)
    layout = Layout(trained, (), (), frozen=tuple(name for name in start if "base_layer" in name))
    context = MergeContext(base=start, layout=layout, round=round, seed=4)
    return build_pipeline(f"{method}(alpha=6.0)", on_bad_update="raise").merge(sent, context, memory)


def layer_weight(state, layer, scaling=2.0):
    """What a layer multiplies by: its base with the pair, as a matrix [out, in]; the server's scaling is 6 / 3."""
    base = state[f"{layer}.base_layer.weight"].double()
    matrix = base.T if SHAPES[layer][1] == "embedding" else base.reshape(len(base), -1)
    return matrix + scaling * product(state, layer)


def close(one, two, tolerance=1e-6):
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance * float(two.abs().max()))


@pytest.mark.parametrize(("method", "ranks"), [("flora", RANKS), ("flora", (3, 3, 3)), ("fedex_lora", (3, 3, 3))])
def test_base_and_pair_together_are_the_mean_of_the_updates(method, ranks):
    """Of linear, convolutional and embedding layers, with unequal weights and alphas, and ranks where they may be."""
    sent, start = clients(ranks, SCALINGS), start_state()
    result = merged(method, sent).state
    for layer in SHAPES:
        base = layer_weight({**start, **{n: torch.zeros_like(start[n]) for n in start if "lora" in n}}, layer)
        close(layer_weight(result, layer), base + mean_update(sent, layer, SCALINGS))


def test_fedex_is_the_published_arithmetic():
    """Singhal et al. 2024: means of the factors, and W0 + sum p_i s B_i A_i - s (sum p_i B_i) (sum p_i A_i)."""
    sent, start = clients((3, 3, 3)), start_state()
    result = merged("fedex_lora", sent).state
    whole = sum(u.weight for u in sent)
    for name in sent[0].state:
        close(result[name], sum(u.weight / whole * u.state[name] for u in sent))
    want = start["fc.base_layer.weight"].double() + 2.0 * (mean_update(sent, "fc") - product(result, "fc"))
    close(result["fc.base_layer.weight"].double(), want)


def test_flora_stacks_and_begins_anew_alike_for_all():
    sent, start = clients((3, 3, 3)), start_state()
    one, two = merged("flora", sent), merged("flora", sent, round=2)
    want = start["fc.base_layer.weight"].double() + 2.0 * mean_update(sent, "fc")
    close(one.state["fc.base_layer.weight"].double(), want)
    for layer in SHAPES:
        assert not product(one.state, layer).any()
    a = "fc.lora_A.default.weight"
    assert one.state[a].any()
    assert not torch.equal(one.state[a], two.state[a])
    assert torch.equal(one.state[a], merged("flora", sent).state[a])


@pytest.mark.parametrize("method", METHODS)
def test_factors_hold_all_that_was_added_and_never_outgrow_the_weight(method):
    start, memory = start_state(), {}
    state = start
    for round in range(1, 5):
        result = merged(method, clients((3, 3, 3), first=10 * round), state, memory, round)
        state, memory = result.state, result.memory
    moved = moved_weights(prefixed("aggregator", memory))
    for layer in SHAPES:
        weight = f"{layer}.base_layer.weight"
        b, a = moved[f"{weight}/folded_B"], moved[f"{weight}/folded_A"]
        assert len(a) <= min(len(b), a.shape[1])
        close(start[weight] + (b @ a).reshape(start[weight].shape), state[weight], 1e-5)


def test_what_cannot_be_honoured_is_refused():
    with pytest.raises(AdapterError, match="which is not known here"):
        build_pipeline("flora(alpha=6.0)").merge(clients(), MergeContext(base=pair_state(2, 0)))
    with pytest.raises(AdapterError, match="clients hold ranks"):
        merged("fedex_lora", clients(RANKS))
    for method in ("flora+server_momentum", "fedex_lora+swa"):
        with pytest.raises(InvalidOption, match="does not follow"):
            build_pipeline(method)


def adapted():
    return Adapters(OwnRanks((2,), (4.0,))).put_into(plain_model(), seed=1)


@pytest.mark.parametrize("method", METHODS)
def test_clients_go_on_from_the_very_model_that_the_server_has(method):
    """They judge what they are sent: the losses are those of the server's model. And the base itself never travels."""
    app = client_app(adapted, tiny_data, training=TRAINING)
    strategy = MergeStrategy(method, model_fn=adapted)
    with SimulationGrid(app, CLIENTS) as simulated:
        grid = MeasuredGrid(simulated)
        result = strategy.start(grid, to_arrays(adapted().state_dict()), num_rounds=3)
    assert strategy.last_report.accepted == (0, 1, 2)
    model, start = adapted(), adapted().state_dict()
    state = from_arrays(result.arrays)
    assert not torch.equal(state["0.base_layer.weight"], start["0.base_layer.weight"])
    assert torch.equal(state["0.base_layer.bias"], start["0.base_layer.bias"])
    model.load_state_dict(state)
    held_out = [tiny_data(i, CLIENTS) for i in range(CLIENTS)]
    losses = [float(nn.functional.cross_entropy(model(d.held_out_x), d.held_out_y)) for d in held_out]
    assert strategy.last_evaluation["eval_loss"] == pytest.approx(sum(losses) / CLIENTS, rel=1e-5)
    assert len(find_pairs(state)) == 2
