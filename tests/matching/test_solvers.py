"""Assignments, couplings and clusters against what can be counted through."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from fedmerge.matching.assignment import assign, assign_blocks, total
from fedmerge.matching.bayes import match_bayes, readiness
from fedmerge.matching.fairness import anchor_of, shares_of
from fedmerge.matching.graph import match_graphs, sinkhorn
from fedmerge.matching.optimal_transport import coupling, mass, plan_of
from fedmerge.matching.weight_costs import layer_by_layer, match_many, match_weights
from fedmerge.matching.zip import zip_clusters
from fedmerge.permutations import Group, PermutationSpec, Site


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orders(n):
    return [torch.tensor(p) for p in permutations(range(n))]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 2, 5])
def test_assign_finds_the_best_of_all(n, seed):
    similarity = normal(n, n, seed=seed)
    found = assign(similarity)
    best = max(orders(n), key=lambda p: total(similarity, p))
    assert torch.equal(found, best)
    assert total(similarity, found) == pytest.approx(sum(float(similarity[i, j]) for i, j in enumerate(best)))


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize(("blocks", "members"), [(2, 2), (3, 2), (2, 3)])
def test_assign_blocks_finds_the_best_of_all(blocks, members, kinds):
    direct = normal(blocks, blocks)
    parts = [normal(blocks, members, blocks, members, seed=7 + k) for k in range(kinds)]
    outer, within = assign_blocks(direct, parts)

    def score(outer, within):
        found = total(direct, outer)
        for similarity, perms in zip(parts, within, strict=True):
            found += sum(total(similarity[i, :, int(outer[i])], perms[i]) for i in range(blocks))
        return found

    one_kind = list(product(orders(members), repeat=blocks))
    best = max(score(o, w) for o in orders(blocks) for w in product(one_kind, repeat=kinds))
    assert score(outer, within) == pytest.approx(best)
    assert sorted(outer.tolist()) == list(range(blocks))
    assert all(sorted(p.tolist()) == list(range(members)) for perms in within for p in perms)


def test_blocks_without_members_are_assigned_by_what_they_have_in_common():
    direct = normal(4, 4)
    outer, within = assign_blocks(direct, [])
    assert torch.equal(outer, assign(direct))
    assert within == []


def layers(sizes):
    """A spec of linear layers, written by hand."""
    groups = []
    for i, size in enumerate(sizes):
        neurons = torch.arange(size)[:, None]
        groups.append(Group(f"{i}", size, (Site(f"{i}", 0, neurons), Site(f"{i + 1}", 1, neurons, "in"))))
    return PermutationSpec(tuple(groups))


@pytest.mark.parametrize("seed", range(5))
def test_weight_matching_is_at_an_optimum_of_each_layer(seed):
    spec = layers([4, 3])
    a, b = (
        {"0": normal(4, 5, seed=s), "1": normal(3, 4, seed=s + 1), "2": normal(2, 3, seed=s + 2)}
        for s in (10 * seed, 10 * seed + 5)
    )

    def objective(perms):
        return sum(float((a[n] * t).sum()) for n, t in spec.apply(b, perms).items())

    found, value = match_weights(spec, a, b, generator=torch.Generator().manual_seed(0))
    assert value == pytest.approx(objective(found))
    assert value >= objective(spec.identity())
    for i in range(2):
        for p in orders(spec.groups[i].size):
            other = list(found)
            other[i] = p
            assert objective(other) <= value + 1e-9


def led_astray():
    """Two layers and a planted order; from the identity, outgoing weights outweigh what comes in."""
    spec = layers([6, 6])
    a = {"0": normal(6, 4), "1": 100 * (torch.eye(6).double() + 0.1 * normal(6, 6, seed=1)), "2": normal(2, 6, seed=2)}
    planted = [torch.tensor([3, 5, 0, 1, 2, 4]), torch.tensor([1, 2, 0, 5, 3, 4])]
    return spec, a, spec.apply(a, planted)


def test_a_match_layer_by_layer_finds_a_planted_order_that_the_identity_misses():
    spec, a, b = led_astray()
    found = spec.apply(b, layer_by_layer(spec, a, b))
    assert all(torch.equal(found[name], a[name]) for name in a)
    alone, _ = match_weights(spec, a, b, generator=torch.Generator().manual_seed(0))
    assert any(not torch.equal(t, a[name]) for name, t in spec.apply(b, alone).items())


def test_matching_many_keeps_the_clearly_better_start():
    spec, a, b = led_astray()
    perms = match_many(spec, [a, b, b], [2.0, 1.0, 1.0], generator=torch.Generator().manual_seed(0))
    first, *others = (spec.apply(state, perm) for state, perm in zip([a, b, b], perms, strict=True))
    assert all(torch.equal(t, first[name]) for other in others for name, t in other.items())


@pytest.mark.parametrize("seed", range(5))
def test_matching_many_brings_each_as_near_to_the_weighted_mean_of_the_others_as_any_order_does(seed):
    spec, weights = layers([4]), [1.0, 2.0, 2.0]  # no client has more say than two usual ones
    states = [{"0": normal(4, 3, seed=9 * seed + i), "1": normal(2, 4, seed=9 * seed + i + 4)} for i in range(3)]
    perms = match_many(spec, states, weights, generator=torch.Generator().manual_seed(0))
    moved = [spec.apply(state, perm) for state, perm in zip(states, perms, strict=True)]
    for i in range(3):
        mean = {n: sum(w * m[n] for j, (w, m) in enumerate(zip(weights, moved, strict=True)) if j != i) for n in "01"}

        def product(order, i=i, mean=mean):
            return sum(float((mean[n] * t).sum()) for n, t in spec.apply(states[i], [order]).items())

        assert product(perms[i][0]) == pytest.approx(max(map(product, orders(4))))


def test_another_start_has_to_shorten_the_squared_distance_by_a_twentieth():
    spec, fates = layers([4, 4]), []
    for seed in range(24):
        a, b = (
            {"0": normal(4, 3, seed=s), "1": normal(4, 4, seed=s + 1), "2": normal(2, 4, seed=s + 2)}
            for s in (9 * seed, 9 * seed + 4)
        )
        usual, own = (torch.Generator().manual_seed(0) for _ in range(2))
        first, value = match_weights(spec, a, b, generator=usual)
        other, another = match_weights(spec, a, b, start=layer_by_layer(spec, a, b), generator=own)
        squares = sum(float(state[n].square().sum()) for state in (a, b) for n in "012")
        part = (squares - 2 * another) / (squares - 2 * value)
        _, found = match_many(spec, [a, b], [3.0, 1.0], generator=torch.Generator().manual_seed(0))
        wanted = other if part < 0.95 else first
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True)), part
        fates.append(round(part, 9))
    assert any(part < 0.95 for part in fates)
    assert any(0.95 < part < 1 for part in fates)
    assert any(1 < part < 1.05 for part in fates)


@pytest.mark.parametrize("clients", [2, 5])
def test_readiness_to_grow_follows_from_the_overlap_of_classes(clients):
    alike, apart = torch.full((clients, clients), 10), 10 * torch.eye(clients)
    assert readiness(alike, 300) == readiness(None, 300) == 50
    assert readiness(apart, 300) == pytest.approx(300 * clients)
    mixed = [readiness(part * alike + (1 - part) * clients * apart, 300) for part in (0.0, 0.2, 0.5)]
    assert mixed == sorted(mixed, reverse=True)
    assert mixed[2] > 50


@pytest.mark.parametrize("solver", ["emd", "sinkhorn"])
@pytest.mark.parametrize("importance", ["uniform", "l1", "l2"])
@pytest.mark.parametrize(("n", "m"), [(4, 4), (6, 4), (3, 5)])
def test_a_coupling_has_its_marginals(n, m, importance, solver):
    a, b = normal(n, 3), normal(m, 3, seed=1)
    mass_a, mass_b = mass(a, importance), mass(b, importance)
    found = coupling(torch.cdist(a, b), mass_a, mass_b, solver, 0.05)
    assert found.shape == (n, m)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(0), mass_b, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.sum(1), mass_a, atol=1e-6, rtol=1e-5)
    plan = plan_of(found)
    torch.testing.assert_close(plan.produce.sum(1), torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(plan.consume.sum(0), torch.ones(m, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Sinkhorn did not converge")
@pytest.mark.parametrize("seed", range(5))
def test_transport_of_equal_masses_is_an_assignment(seed):
    cost = normal(6, 6, seed=seed).abs()
    uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
    found = coupling(cost, uniform, uniform, "emd", 0.01)
    simplex = torch.from_numpy(ot.emd(uniform.numpy(), uniform.numpy(), cost.numpy()))
    torch.testing.assert_close(found, simplex)
    best = min(orders(6), key=lambda p: total(cost, p))
    torch.testing.assert_close(found * 6, torch.eye(6, dtype=torch.float64)[best])
    near = coupling(cost, uniform, uniform, "sinkhorn", 0.001)
    torch.testing.assert_close((near * cost).sum(), (found * cost).sum(), rtol=0.05, atol=1e-3)


def test_a_dead_neuron_weighs_something():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    for importance in ("l1", "l2"):
        found = mass(features, importance)
        assert 0 < found[0] < 1e-5
        assert float(found.sum()) == pytest.approx(1)


def test_masses_are_norms():
    features = torch.tensor([[3.0, -4.0], [1.0, 0.0]])
    assert mass(features, "l1").tolist() == pytest.approx([7 / 8, 1 / 8], rel=1e-5)
    assert mass(features, "l2").tolist() == pytest.approx([5 / 6, 1 / 6], rel=1e-5)
    assert mass(features, "uniform").tolist() == [0.5, 0.5]


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_sinkhorn_is_doubly_stochastic(scale):
    found = sinkhorn(scale * normal(3, 6, 6), 500)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(-2), torch.ones(3, 6, dtype=torch.float64))
    if scale < 10:
        torch.testing.assert_close(found.sum(-1), torch.ones(3, 6, dtype=torch.float64))


def test_sinkhorn_of_a_sharp_permutation_is_it():
    wanted = torch.eye(5, dtype=torch.float64)[torch.tensor([3, 1, 4, 0, 2])]
    torch.testing.assert_close(sinkhorn(50 * wanted, 20), wanted)


def graduated(states, weights, temperatures, iterations):
    """Graduated assignment of one hidden layer in NumPy: the order of each model's neurons."""
    models = [np.concatenate([s["0"], s["1"].T], 1) for s in states]
    common = models[anchor_of(states, weights)]
    for temperature in temperatures:
        found, mean = [], 0.0
        for model, share in zip(models, shares_of(weights), strict=True):
            affinity = 0.0
            for columns in (slice(0, 3), slice(3, 5)):  # incoming and outgoing edges
                distance = np.linalg.norm(common[:, None, columns] - model[None, :, columns], axis=2)
                affinity = affinity + np.exp(-distance / distance.mean())
            scores = affinity / (temperature * affinity.std(ddof=1))
            for _ in range(iterations):
                scores = scores - np.logaddexp.reduce(scores, 1, keepdims=True)
                scores = scores - np.logaddexp.reduce(scores, 0, keepdims=True)
            found.append(linear_sum_assignment(np.exp(scores), maximize=True)[1])
            mean = mean + share * model[found[-1]]
        common = mean
    return found


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 4.0, 8.0]])
def test_graphs_are_matched_by_graduated_assignment_to_their_weighted_mean(weights):
    spec, others = layers([5]), 0
    for seed in range(8):
        states = [{"0": normal(5, 3, seed=9 * seed + i), "1": normal(2, 5, seed=9 * seed + i + 4)} for i in range(3)]
        found = match_graphs(spec, states, weights, temperatures=(2.0, 0.5, 0.1), iterations=20)
        wanted = graduated(states, weights, (2.0, 0.5, 0.1), 20)
        assert [perms[0].tolist() for perms in found] == [order.tolist() for order in wanted], seed
        equal = graduated(states, [1.0] * 3, (2.0, 0.5, 0.1), 20)
        others += any((one != other).any() for one, other in zip(wanted, equal, strict=True))
    assert (others > 0) == (weights[0] != weights[1])


def bayes(features, *, precision=1.0, **options):
    precisions = [torch.full((f.shape[1],), precision, dtype=torch.float64) for f in features]
    options = {"sigma0": 1.0, "gamma": 1e-3, "sweeps": 5, **options}
    return match_bayes(features, precisions, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("clients", [2, 3, 12])
def test_permuted_copies_found_one_layer(clients):
    own = 3 * normal(8, 10)
    perms = [torch.randperm(8, generator=torch.Generator().manual_seed(i)) for i in range(clients)]
    found = bayes([own[p] for p in perms])
    assert found.size == 8
    places = torch.stack([a[torch.argsort(p)] for a, p in zip(found.assignments, perms, strict=True)])
    assert (places == places[0]).all()
    assert sorted(places[0].tolist()) == list(range(8))


def test_one_client_keeps_its_layer():
    found = bayes([normal(7, 3)])
    assert found.size == 7
    assert sorted(found.assignments[0].tolist()) == list(range(7))


def test_strangers_found_neurons_of_their_own_where_that_is_cheap():
    one, other = 5 * torch.eye(8, dtype=torch.float64)[:4], 5 * torch.eye(8, dtype=torch.float64)[4:]
    far = bayes([one, other], gamma=50.0)
    assert far.size == 8
    assert not set(far.assignments[0].tolist()) & set(far.assignments[1].tolist())
    assert bayes([one, other], gamma=50.0, max_width=6).size <= 6


def test_a_layer_grows_no_wider_than_it_may():
    clients = [5 * torch.eye(12, dtype=torch.float64)[4 * i : 4 * i + 4] for i in range(3)]
    assert bayes(clients, gamma=50.0, max_width=4).size == 4


def test_a_narrow_client_is_part_of_a_wide_one():
    own = 3 * normal(9, 6)
    found = bayes([own[[7, 2, 4]], own])
    assert found.size == 9
    assert torch.equal(found.assignments[0], found.assignments[1][[7, 2, 4]])


def test_no_width_below_the_widest_client():
    found = bayes([normal(5, 4), normal(9, 4, seed=1)], max_width=2)
    assert found.size >= 9
    for assigned in found.assignments:
        assert assigned.unique().numel() == len(assigned)
        assert assigned.max() < found.size


def test_the_first_join_and_the_second_by_hand():
    """Gains as in the paper, counted through for a client that joins another."""
    one, other = normal(3, 4), normal(3, 4, seed=1)
    s, sigma0, gamma = 0.7, 1.3, 0.2
    prior = 1 / sigma0

    def gain(w, v):
        mean, precision = s * w, prior + s
        return float(((mean + s * v) ** 2 / (precision + s) - mean**2 / precision).sum())  # log(1 / (2 - 1)) is 0

    def founding(v, k):
        new = float(((s * v) ** 2 / (prior + s)).sum())
        return new - 2 * torch.tensor(float(k)).log().item() + 2 * torch.tensor(gamma / 2).log().item()

    best, wanted = -float("inf"), None
    for columns in permutations(range(6), 3):
        value = 0.0
        for i, c in enumerate(columns):
            value += gain(one[c], other[i]) if c < 3 else founding(other[i], c - 2)
        if value > best:
            best, wanted = value, columns
    found = bayes([one, other], precision=s, sigma0=sigma0, gamma=gamma, sweeps=0)
    places = found.assignments[0].tolist()  # the first client founded its neurons in some order
    assert found.size == 3 + sum(c >= 3 for c in wanted)
    for i, c in enumerate(wanted):
        got = int(found.assignments[1][i])
        assert got == places[c] if c < 3 else got >= 3


@pytest.mark.parametrize("clients", [2, 3])
def test_where_joining_tips_over_into_founding_by_hand(clients):
    """The last of two or three clients with a neuron each joins what all before it share, or founds its own."""
    s, prior, v = 0.7, 1 / 1.3, torch.tensor([[2.0, 1.0], [2.1, 0.9], [-0.6, 1.0]], dtype=torch.float64)
    v = torch.cat([v[: clients - 1], v[2:]])
    known, precision = s * v[:-1].sum(0), prior + s * (clients - 1)
    joining = ((known + s * v[-1]) ** 2 / (precision + s) - known**2 / precision).sum()
    joining += math.log((clients - 1) / 1)  # log m / (J - m), m = J - 1
    founding = ((s * v[-1]) ** 2 / (prior + s)).sum()
    even = clients * math.exp(float(joining - founding) / 2)  # joining = founding + 2 log(gamma / J)
    for gamma, size in ((0.999 * even, 1), (1.001 * even, 2)):
        found = bayes([one[None] for one in v], precision=s, sigma0=1.3, gamma=gamma, sweeps=0)
        assert found.size == size, gamma
        assert len({int(assigned) for assigned in found.assignments[:-1]}) == 1


@pytest.mark.parametrize("models", [2, 3])
def test_zip_pairs_the_neurons_of_equal_models(models):
    own = normal(6, 200)
    perms = [torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(models)]
    similarity = torch.corrcoef(torch.cat([own[p] for p in perms]))
    owner = torch.arange(models).repeat_interleave(6)
    found = zip_clusters(similarity, owner, 6, discount=0.9, budget=0.0)
    places = torch.stack([part[torch.argsort(p)] for part, p in zip(found.split(6), perms, strict=True)])
    assert (places == places[0]).all()
    assert sorted(places[0].tolist()) == list(range(6))


@pytest.mark.parametrize("models", [2, 3, 4, 5])
def test_zip_keeps_twins_together_however_many_models_there_are(models):
    """Neurons of one model correlate more than the discount leaves of what twins have in common."""
    own = normal(6, 200) + 2 * normal(1, 200, seed=1)
    similarity = torch.corrcoef(own.repeat(models, 1))
    owner = torch.arange(models).repeat_interleave(6)
    found = zip_clusters(similarity, owner, 6, discount=0.3, budget=0.125)
    assert (found.reshape(models, 6) == found[:6]).all()
    assert sorted(found[:6].tolist()) == list(range(6))


@pytest.mark.parametrize("budget", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clusters", [1, 4, 6, 9, 12])
def test_zip_leaves_as_many_clusters_as_wanted(clusters, budget):
    similarity = torch.corrcoef(normal(12, 30))
    before = similarity.clone()
    found = zip_clusters(similarity, torch.arange(2).repeat_interleave(6), clusters, discount=0.5, budget=budget)
    assert sorted(found.unique().tolist()) == list(range(clusters))
    assert torch.equal(similarity, before)


@pytest.mark.parametrize(
    ("budget", "within"),
    [
        (0.0, 0),
        (0.25, 1),
        (0.5, 2),
    ],
)
def test_zip_merges_within_a_model_as_far_as_the_budget_goes(budget, within):
    """Each model has two pairs of twins that correlate more than anything across."""
    similarity = torch.full((8, 8), 0.1, dtype=torch.float64) + 0.01 * normal(8, 8).abs()
    similarity = (similarity + similarity.T) / 2
    for i in range(0, 8, 2):
        similarity[i, i + 1] = similarity[i + 1, i] = 0.9 - 0.01 * i
    found = zip_clusters(similarity, torch.arange(2).repeat_interleave(4), 4, discount=1.0, budget=budget)
    spent = [sum(int(found[i] == found[i + 1]) for i in (start, start + 2)) for start in (0, 4)]
    assert max(spent) == within


def greedy(similarity, clusters, discount):
    """One best pair after the other."""
    parts = [{i} for i in range(len(similarity))]
    scores = {(i, j): float(similarity[i, j]) for i in range(len(parts)) for j in range(len(parts)) if i != j}
    names = list(range(len(parts)))
    while len(names) > clusters:
        i, j = max(((i, j) for i in names for j in names if i < j), key=lambda pair: scores[pair])
        parts[i] |= parts[j]
        names.remove(j)
        for k in names:
            if k != i:
                scores[i, k] = scores[k, i] = min(scores[i, k], scores[j, k]) * discount
    return {frozenset(parts[i]) for i in names}


def zipped(similarity, clusters, discount):
    owner = torch.arange(len(similarity)) % 2
    found = zip_clusters(similarity, owner, clusters, discount=discount, budget=1.0)
    return {frozenset((found == c).nonzero().ravel().tolist()) for c in range(clusters)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("clusters", [5, 7])
def test_zip_takes_the_best_pairs_first(clusters, seed):
    """What has been merged is discounted below all else, so pairs come first."""
    raw = torch.rand(10, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    similarity = 0.5 + (raw + raw.T) / 4
    assert zipped(similarity, clusters, 0.3) == greedy(similarity, clusters, 0.3)


def test_zip_stops_where_one_pair_after_the_other_would():
    similarity = torch.full((5, 5), 0.1, dtype=torch.float64)
    for i, j, value in ((0, 1, 0.9), (0, 2, 0.85), (1, 2, 0.85), (3, 4, 0.5)):
        similarity[i, j] = similarity[j, i] = value
    assert greedy(similarity, 3, 1.0) == {frozenset({0, 1, 2}), frozenset({3}), frozenset({4})}
    assert zipped(similarity, 3, 1.0) == greedy(similarity, 3, 1.0)
