"""Laws of rules for low-rank pairs; which rule keeps which stands in one table."""

from __future__ import annotations

import pytest
import torch

from fedmerge import ClientUpdate, MergeContext
from fedmerge.adapters import find_pairs
from fedmerge.adapters.low_rank_pairs import padded
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.errors import AdapterError, InvalidOption
from fedmerge.merging import build_pipeline
from tests.adapters.pair_cases import RANKS, SCALINGS, SHAPES, WEIGHTS, clients, mean_update, names, pair_state, product

UNEQUAL, MEAN, CUT, ROTATED = "unequal ranks", "the mean", "the mean, cut", "rotation"
KEEPS = {
    "fedit": (),
    "flexlora": (UNEQUAL, CUT, ROTATED),
    "core_space": (UNEQUAL, CUT, ROTATED),
    "hetlora": (UNEQUAL,),
    "raflora": (UNEQUAL,),
    "fedrot_lora": (UNEQUAL, ROTATED),
    "lora_fair": (),
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
    method = f"{method}(regularization=0)" if method == "lora_fair" else method
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


def means(sent, weights=None):
    """Weighted means of the factors, in float64."""
    weights = weights or [u.weight / sum(u.weight for u in sent) for u in sent]
    return {n: sum(w * u.state[n].double() for w, u in zip(weights, sent, strict=True)) for n in sent[0].state}


def test_hetlora_weighs_by_the_norm_of_the_update():
    """Cho et al. 2024: zeros up to the largest rank, weights ``||B_i A_i|| / sum_j ||B_j A_j||``, by layer."""
    like, sent = pair_state(3, 0), clients(RANKS)
    result = merged("hetlora", sent, base=like)
    for layer in SHAPES:
        norms = [float(torch.linalg.matrix_norm(product(u.state, layer))) for u in sent]
        a, b = names(layer)
        filled = [ClientUpdate(u.client, padded(u.state, find_pairs(like), like), u.weight) for u in sent]
        want = means(filled, [norm / sum(norms) for norm in norms])
        close(result[a].double(), want[a])
        close(result[b].double(), want[b])
    examples = merged("hetlora(weigh=examples)", sent, base=like)
    close(examples[a].double(), means(filled)[a])
    both = merged("hetlora(weigh=both)", sent, base=like)
    assert not torch.allclose(both[a], result[a])


def test_hetlora_of_updates_of_zero_goes_by_examples():
    sent = clients()
    still = [
        ClientUpdate(u.client, {n: torch.zeros_like(t) if "_B." in n else t for n, t in u.state.items()}, u.weight)
        for u in sent
    ]
    result = merged("hetlora", still)
    assert all(bool(tensor.isfinite().all()) for tensor in result.values())
    close(result["fc.lora_A.default.weight"].double(), means(still)["fc.lora_A.default.weight"])


def test_raflora_divides_every_slice_by_those_who_hold_it():
    like, sent = pair_state(4, 50), clients(RANKS)
    result = merged("raflora", sent, base=like)
    a = "fc.lora_A.default.weight"
    rows = [u.state[a].double() for u in sent]
    close(result[a][0].double(), (5 * rows[0][0] + 1 * rows[1][0] + 14 * rows[2][0]) / 20)
    close(result[a][1].double(), (5 * rows[0][1] + 1 * rows[1][1]) / 6)
    close(result[a][2].double(), rows[1][2])
    assert torch.equal(result[a][3], like[a][3])  # which nobody holds
    equal = clients()
    close(merged("raflora", equal)[a], merged("fedit", equal)[a])


def test_turns_towards_the_pair_that_was_sent_undo_all_turns():
    start = clients((2,), weights=(1.0,))[0]
    sent = [ClientUpdate(i, turned(start, seed=i).state, weight) for i, weight in enumerate(WEIGHTS)]
    result = merged("fedrot_lora", sent, base=start.state)
    for name, tensor in result.items():
        close(tensor, start.state[name], 1e-5)
    cross = merged("fedit", sent)
    assert not torch.allclose(product(cross, "fc"), product(start.state, "fc"), rtol=0.02)


def test_lora_fair_projects_the_mean_of_updates_onto_the_mean_of_a():
    sent = clients()
    exact, damped = merged("lora_fair(regularization=0)", sent), merged("lora_fair(regularization=0.5)", sent)
    for layer in SHAPES:
        a, b = (means(sent)[name].flatten(1) for name in names(layer))
        target, gram = mean_update(sent, layer), a @ a.T
        close(product(exact, layer), target @ a.T @ torch.linalg.inv(gram) @ a, 1e-5)
        move = (target - b @ a) @ a.T @ torch.linalg.inv(gram + 0.5 * gram.diagonal().mean() * torch.eye(2))
        close(product(damped, layer), (b + move) @ a, 1e-5)


def test_in_core_space_any_method_merges_as_on_full_updates():
    """Linear methods do, and such that do not depend on the basis; the others see other coordinates."""
    sent, start = clients(RANKS), pair_state(9, 40)
    for method in ("task_arithmetic(scale=0.5)", "iso_c"):
        result = merged(f"core_space(combine='{method}')", sent, base=start)
        for layer in SHAPES:
            whole = [ClientUpdate(u.client, {"w": product(u.state, layer)}, u.weight) for u in sent]
            full = build_pipeline(method).merge(whole, MergeContext(base={"w": product(start, layer)})).state["w"]
            close(product(result, layer), full, 1e-4)
    for method in ("ties(density=0.5)", "median", "tsv_m", "krum"):
        result = merged(f"core_space(combine='{method}')", sent, base=start)
        assert bool(torch.isfinite(product(result, "conv")).all())


def test_adapters_at_hand_are_task_vectors_by_themselves():
    sent = [ClientUpdate(u.client, {n: t for n, t in u.state.items() if n != "bias"}, u.weight) for u in clients()]
    whole = merged("core_space(combine='task_arithmetic(scale=0.5)')", sent)
    half = merged("core_space", sent)
    for layer in SHAPES:
        close(product(whole, layer), 0.5 * product(half, layer))


def test_core_space_refuses_what_wants_more_than_tensors():
    for method in ("fisher", "otfusion", "flexlora", "scaffold", "fedavg+server_momentum"):
        with pytest.raises(InvalidOption, match="combine"):
            build_pipeline(f"core_space(combine='{method}')")


def test_fedit_averages_factors():
    sent = clients()
    result = merged("fedit", sent)
    for name, tensor in result.items():
        close(tensor, sum(u.weight / 20.0 * u.state[name] for u in sent))
