"""Rules under which clients train one factor: the mean of the updates, exactly, for half the bytes."""

from __future__ import annotations

import pytest
import torch

from fedmerge import ClientUpdate, MergeContext
from fedmerge.adapters import Adapters, OwnRanks, find_pairs
from fedmerge.adapters.low_rank_pairs import padded
from fedmerge.errors import AdapterError, NoUsableUpdates
from fedmerge.merging import build_pipeline
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, to_arrays
from tests.adapters.pair_cases import RANKS, SCALINGS, SHAPES, WEIGHTS, names, pair_state, product, told
from tests.federation import CLIENTS, TRAINING, plain_model, tiny_data

START = pair_state(3, 0)
DRAWN = {names(layer)[kind == "embedding"] for layer, (_, kind) in SHAPES.items()}
"""Factors that start with random numbers: A, and of the embedding B."""


def merged(method, updates, round=1, base=START):
    return build_pipeline(method, on_bad_update="raise").merge(updates, MergeContext(base=base, round=round)).state


def trained(round=1, ranks=(3, 3, 3), scalings=None):
    """Clients that send what they trained; the other factor is the server's."""
    sent = []
    for i, rank in enumerate(ranks):
        state = pair_state(rank, 10 + i)
        held = DRAWN if round % 2 else {n for n in state if n != "bias"} - DRAWN
        statistics = {} if scalings is None else told(START, scalings[i])
        sent.append(ClientUpdate(i, {n: t for n, t in state.items() if n not in held}, WEIGHTS[i], statistics))
    return sent


def whole(update, scaling=1.0):
    """A client's own update in full: what it trained, with the first slices of what it was sent."""
    state = padded(update.state, find_pairs(START), START)
    return {layer: scaling * product({**START, **state}, layer) for layer in SHAPES}


def mean(sent, scalings=None):
    scalings = scalings or [1.0] * len(sent)
    every = [whole(u, s) for u, s in zip(sent, scalings, strict=True)]
    return {layer: sum(w / 20.0 * one[layer] for w, one in zip(WEIGHTS, every, strict=True)) for layer in SHAPES}


def close(one, two, tolerance=1e-6):
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance * float(two.abs().max()))


@pytest.mark.parametrize("method", ["ffa_lora", "rolora", "fedsvd", "fedsvd(every=2)"])
@pytest.mark.parametrize("ranks", [(3, 3, 3), RANKS])
def test_the_product_is_the_mean_of_the_updates(method, ranks):
    sent = trained(ranks=ranks)
    result, want = merged(method, sent), mean(sent)
    for layer in SHAPES:
        close(product(result, layer), want[layer])


def test_rolora_averages_a_in_even_rounds_and_b_in_odd_ones():
    """Chen et al. 2024, algorithm 1: B+ = sum p B_i beside A, then A+ = sum p A_i beside B."""
    for round in (1, 2):
        sent = trained(round)
        result, want = merged("rolora", sent, round), mean(sent)
        for layer, (_, kind) in SHAPES.items():
            a, b = names(layer)
            moved, held = (b, a) if (round == 1) != (kind == "embedding") else (a, b)
            assert torch.equal(result[held], START[held])
            close(result[moved], sum(u.weight / 20 * u.state[moved] for u in sent))
            close(product(result, layer), want[layer])


def test_unequal_alphas_count_where_b_is_trained():
    sent = trained(scalings=SCALINGS)
    result, want = merged("ffa_lora(alpha=3.0)", sent), mean(sent, SCALINGS)  # the server's scaling is 1
    for layer in ("fc", "conv"):
        close(product(result, layer), want[layer])


def test_fedsvd_leaves_a_with_rows_of_length_one_at_right_angles():
    a, b = names("fc")
    result = merged("fedsvd", trained())
    torch.testing.assert_close(result[a] @ result[a].T, torch.eye(3), rtol=0, atol=1e-5)
    assert torch.equal(merged("fedsvd(every=2)", trained())[a], START[a])
    assert not torch.equal(merged("fedsvd(every=2)", trained(), round=2, base=START)[b], START[b])


def test_a_held_factor_that_comes_back_moved_is_refused_and_one_that_does_not_is_fine():
    sent = trained()
    back = [ClientUpdate(u.client, {**START, **u.state}, u.weight) for u in sent]
    for name, tensor in merged("ffa_lora", back).items():
        assert torch.equal(tensor, merged("ffa_lora", sent)[name])
    a = names("fc")[0]
    moved = ClientUpdate(1, {**back[1].state, a: START[a] + 1}, 1.0)
    with pytest.raises(NoUsableUpdates, match=r"'fc\.lora_A\.default\.weight' is not as it was sent"):
        build_pipeline("ffa_lora").merge([moved], MergeContext(base=START))


def adapted():
    return Adapters(OwnRanks((2,), (4.0,))).put_into(plain_model(), seed=1)


def run(method, rounds, **settings):
    app = client_app(adapted, tiny_data, training=TRAINING)
    strategy = MergeStrategy(method, model_fn=adapted, fraction_evaluate=0.0, **settings)
    with SimulationGrid(app, CLIENTS) as simulated:
        grid = MeasuredGrid(simulated)
        result = strategy.start(grid, to_arrays(adapted().state_dict()), num_rounds=rounds)
    assert strategy.last_report.accepted == (0, 1, 2)
    return from_arrays(result.arrays), [one.bytes_up for one in grid.exchanges]


def test_clients_send_only_the_factor_that_they_train():
    start = adapted().state_dict()
    pairs = find_pairs(start)
    a, b = (sum(start[getattr(pair, side)].numel() for pair in pairs) for side in "ab")
    state, sent = run("ffa_lora", 1)
    assert all(torch.equal(state[pair.a], start[pair.a]) for pair in pairs)
    assert not any(torch.equal(state[pair.b], start[pair.b]) for pair in pairs)
    _, both = run("fedit", 1)
    assert both[0] - sent[0] >= 4 * CLIENTS * a
    state, sent = run("rolora", 2)
    assert not any(torch.equal(state[name], start[name]) for pair in pairs for name in (pair.a, pair.b))
    assert sent[0] - sent[1] == pytest.approx(4 * CLIENTS * (b - a), abs=64)


def test_fedsa_shares_a_and_leaves_b_with_the_clients():
    state, _ = run("fedsa_lora", 2, personal=["*lora_B*"])
    start = adapted().state_dict()
    for pair in find_pairs(start):
        assert torch.equal(state[pair.b], start[pair.b])
        assert not torch.equal(state[pair.a], start[pair.a])
    with pytest.raises(AdapterError, match="set personal"):
        run("fedsa_lora", 1)
    with pytest.raises(AdapterError, match="clients send none"):
        build_pipeline("fedsa_lora").merge([ClientUpdate(0, {"w": torch.ones(2)})], MergeContext())
