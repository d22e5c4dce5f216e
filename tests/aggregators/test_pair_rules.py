"""Laws of rules for low-rank pairs; which rule keeps which stands in one table."""

from __future__ import annotations

import pytest
import torch

from fedmerge import ClientUpdate, MergeContext
from fedmerge.adapters import find_pairs
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.errors import AdapterError, InvalidOption
from fedmerge.merging import build_pipeline
from tests.adapters.pair_cases import RANKS, SCALINGS, SHAPES, WEIGHTS, clients, mean_update, names, pair_state, product

UNEQUAL, MEAN, CUT, ROTATED = "unequal ranks", "the mean", "the mean, cut", "rotation"
KEEPS = {
    "fedit": (),
    "flexlora": (UNEQUAL, CUT, ROTATED),
}
"""By rule: unequal ranks are taken; the result is the mean of the updates; or that mean cut to the rank of the
adapter; and it does not depend on how a client has turned its factors."""


def of(law):
    return [method for method, laws in KEEPS.items() if law in laws]


def merged(method, updates, **context):
    return build_pipeline(method).merge(updates, MergeContext(**context)).state


def close(one, two, tolerance=1e-6):
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance * float(two.abs().max()))


@pytest.mark.parametrize("method", KEEPS)
def test_one_client_and_equal_clients_give_their_update(method):
    (update,) = clients((2,), weights=(3.0,))
    for sent in ([update], [ClientUpdate(i, update.state, weight) for i, weight in enumerate(WEIGHTS)]):
        result = merged(method, sent)
        for layer in SHAPES:
            close(product(result, layer), product(update.state, layer))
        close(result["bias"], update.state["bias"])


@pytest.mark.parametrize("method", KEEPS)
def test_neither_the_order_of_clients_nor_the_size_of_weights_matters(method):
    sent = clients()
    straight = merged(method, sent)
    assert all(torch.equal(t, straight[n]) for n, t in merged(method, [sent[i] for i in (2, 0, 1)]).items())
    scaled = merged(method, [ClientUpdate(u.client, u.state, 1000 * u.weight) for u in sent])
    for layer in SHAPES:
        close(product(scaled, layer), product(straight, layer), 1e-5)


def full_rank(sent):
    """The same clients, filled up to a rank that holds the mean of their updates."""
    rank = sum(len(u.state["fc.lora_A.default.weight"]) for u in sent)
    like = pair_state(rank, 0)
    return like, [ClientUpdate(u.client, u.state, u.weight, u.statistics) for u in sent]


@pytest.mark.parametrize("method", [*of(MEAN), *of(CUT)])
def test_exact_rules_give_the_mean_of_the_updates(method):
    """With unequal weights, ranks and alphas, of linear, convolutional and embedding layers."""
    sent = clients(RANKS, SCALINGS)
    like, sent = full_rank(sent)
    result = merged(f"{method}(alpha={float(sum(RANKS))})", sent, base=like)
    for layer in SHAPES:
        close(product(result, layer), mean_update(sent, layer, SCALINGS))


@pytest.mark.parametrize("method", of(CUT))
def test_what_a_cut_to_the_rank_of_the_adapter_loses_is_the_tail_of_singular_values(method):
    sent = clients()
    result = merged(method, sent)
    for layer in SHAPES:
        want = mean_update(sent, layer)
        tail = torch.linalg.svdvals(want)[2:].norm()
        lost = torch.linalg.matrix_norm(product(result, layer) - want)
        assert float(lost) == pytest.approx(float(tail), rel=1e-4)


def turned(update, seed=5):
    """The same update in other factors: ``B R^T`` and ``R A``."""
    state = dict(update.state)
    for layer in SHAPES:
        a, b = names(layer)
        turn = torch.linalg.qr(
            torch.randn(len(state[a]), len(state[a]), generator=torch.Generator().manual_seed(seed))
        )[0]
        state[a] = torch.einsum("rs,s...->r...", turn, state[a])
        state[b] = torch.einsum("os...,rs->or...", state[b], turn)
    return ClientUpdate(update.client, state, update.weight, update.statistics)


@pytest.mark.parametrize("method", KEEPS)
def test_turning_one_clients_factors_changes_only_rules_that_look_at_them(method):
    sent = clients()
    other = [sent[0], turned(sent[1]), sent[2]]
    straight, moved = merged(method, sent), merged(method, other)
    for layer in SHAPES:
        close(product(other[1].state, layer), product(sent[1].state, layer))
        if method in of(ROTATED):
            close(product(moved, layer), product(straight, layer), 1e-5)
        else:
            assert not torch.allclose(product(moved, layer), product(straight, layer), rtol=1e-2)


@pytest.mark.parametrize("method", [method for method in KEEPS if method not in of(UNEQUAL)])
def test_rules_that_average_factors_refuse_unequal_ranks(method):
    with pytest.raises(AdapterError, match=r"clients hold ranks \[1, 2, 3\]"):
        merged(method, clients(RANKS), base=pair_state(3, 0))


@pytest.mark.parametrize("method", KEEPS)
def test_a_model_without_pairs_is_refused(method):
    with pytest.raises(AdapterError, match="clients train none here"):
        merged(method, [ClientUpdate(0, {"weight": torch.ones(2, 2)})])


@pytest.mark.parametrize("method", KEEPS)
def test_unequal_alphas_count(method):
    """Factors times s are those of a client with scaling s."""
    sent, scaled = clients(scalings=SCALINGS), []
    for update, scaling in zip(sent, SCALINGS, strict=True):
        state = {n: t * scaling if "_B." in n else t for n, t in update.state.items()}
        scaled.append(ClientUpdate(update.client, state, update.weight))
    for layer in SHAPES:
        close(product(merged(f"{method}(alpha=2.0)", sent), layer), product(merged(method, scaled), layer), 1e-5)


def given(updates, **how):
    return PairUpdates.of(updates, MergeContext(), "method", **how)


def test_scalings_come_from_the_client_then_the_model_and_are_asked_for_where_they_matter():
    pair = find_pairs(pair_state(2, 0))[0]
    assert given(clients()).units(pair) == [1.0, 1.0, 1.0]
    assert given(clients(scalings=(3.0, 3.0, 3.0))).units(pair) == [1.0, 1.0, 1.0]
    assert given(clients(scalings=(3.0, 3.0, 3.0))).scaling(pair) == 3.0
    assert given(clients(scalings=(3.0, 6.0, 1.5)), alpha=6.0).units(pair) == [1.0, 2.0, 0.5]
    with pytest.raises(InvalidOption, match="pass model_fn=, or alpha="):
        given(clients(scalings=(3.0, 6.0, 1.5))).units(pair)
    with pytest.raises(InvalidOption, match="nobody tells their scaling"):
        given(clients()).scaling(pair)


def test_flexlora_is_the_published_arithmetic():
    """Bai et al. 2024: the weighted mean of the full matrices, its singular value decomposition, r of its values."""
    sent = clients()
    result = merged("flexlora", sent)
    for layer in SHAPES:
        left, values, right = torch.linalg.svd(mean_update(sent, layer), full_matrices=False)
        want = left[:, :2] @ torch.diag(values[:2]) @ right[:2]
        close(product(result, layer), want)


def test_fedit_averages_factors():
    sent = clients()
    result = merged("fedit", sent)
    for name, tensor in result.items():
        close(tensor, sum(u.weight / 20.0 * u.state[name] for u in sent))
