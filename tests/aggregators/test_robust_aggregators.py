"""Robust aggregators against NumPy and SciPy, and how far one hostile client moves them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import trim_mean

from fedmerge import BadUpdate, ClientUpdate, InvalidOption, MergeContext, NoUsableUpdates
from fedmerge.aggregators import pieces as robust
from fedmerge.aggregators.geometric_median import GeometricMedian
from fedmerge.aggregators.krum import Krum
from fedmerge.aggregators.median import Median
from fedmerge.aggregators.median_norm_clipping import MedianNormClipping
from fedmerge.aggregators.norm_clipping import NormClipping
from fedmerge.aggregators.trimmed_mean import TrimmedMean
from fedmerge.merging import build_pipeline

SHAPES = {"w": (4, 3), "b": (5,), "temperature": (), "none": (0, 2)}
ROBUST = [Median(), TrimmedMean(), GeometricMedian(), Krum(), Krum(selected=3), NormClipping(), MedianNormClipping()]


def clients(count, seed=0):
    draw = np.random.default_rng(seed)
    return [{name: draw.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(count)]


def merged(aggregator, states, weights=None):
    weights = weights or [1.0] * len(states)
    sent = [ClientUpdate(i, {n: torch.tensor(v) for n, v in s.items()}, weights[i]) for i, s in enumerate(states)]
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    return aggregator.merge(sent, MergeContext(base=base), {})[0]


def flat(state):
    return np.concatenate([np.asarray(state[name]).ravel() for name in SHAPES])


def stacked(states):
    return np.stack([flat(state) for state in states])


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("numbers", [None, 7])
def test_the_median_is_numpys(count, numbers, monkeypatch):
    if numbers:  # pieces of one coordinate, or of a few
        monkeypatch.setattr(robust, "_NUMBERS", numbers)
    states = clients(count)
    np.testing.assert_allclose(flat(merged(Median(), states)), np.median(stacked(states), 0), atol=1e-12)


@pytest.mark.parametrize(("count", "trim"), [(10, 0.2), (10, 0.29), (7, 0.45), (3, 0.2), (4, 0.0), (100, 0.29)])
def test_the_trimmed_mean_is_scipys(count, trim):
    states = clients(count)
    want = trim_mean(stacked(states), trim + 1e-12, axis=0)
    np.testing.assert_allclose(flat(merged(TrimmedMean(trim), states)), want, atol=1e-12)


@pytest.mark.parametrize("weights", [[1.0] * 6, [1.0, 2.0, 3.0, 1.0, 2.0, 1.5]])
def test_the_geometric_median_minimises_the_weighted_sum_of_distances(weights):
    x = stacked(clients(6))

    def total(v):
        return np.dot(weights, np.linalg.norm(x - v, axis=1))

    want = minimize(total, x.mean(0), method="BFGS", options={"gtol": 1e-9}).x
    got = flat(merged(GeometricMedian(iterations=1000, tolerance=0.0), clients(6), weights))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_one_step_of_weiszfeld_by_hand():
    x, weights = stacked(clients(4)), np.array([1.0, 2.0, 3.0, 4.0]) / 10
    pulls = weights / np.linalg.norm(x - weights @ x, axis=1)
    got = flat(merged(GeometricMedian(iterations=1), clients(4), (10 * weights).tolist()))
    np.testing.assert_allclose(got, pulls @ x / pulls.sum(), atol=1e-12)


@pytest.mark.parametrize(("attackers", "hostile"), [(2, 2), (0.25, 2), (0, 0)])
@pytest.mark.parametrize("selected", [1, 4, 99])
def test_krum_by_hand(attackers, hostile, selected):
    n, x = 9, stacked(clients(9))
    squares = ((x[:, None] - x[None]) ** 2).sum(-1)
    scores = [np.sort(np.delete(squares[i], i))[: n - hostile - 2].sum() for i in range(n)]
    want = x[np.argsort(scores)[: min(selected, n - hostile)]].mean(0)
    got = flat(merged(Krum(attackers=attackers, selected=selected), clients(n)))
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("bound", [0.5, 4.0, 100.0])
def test_norm_clipping_by_hand(bound):
    x, weights = stacked(clients(5)), np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    norms = np.linalg.norm(x, axis=1)
    want = weights / weights.sum() @ (x / np.maximum(1, norms / bound)[:, None])
    np.testing.assert_allclose(flat(merged(NormClipping(bound), clients(5), weights.tolist())), want, atol=1e-12)
    bound = 0.5 * np.median(norms)
    want = weights / weights.sum() @ (x * bound / norms[:, None])
    assert (norms > bound).all()
    np.testing.assert_allclose(flat(merged(MedianNormClipping(0.5), clients(5), weights.tolist())), want, atol=1e-12)


@pytest.mark.parametrize("aggregator", ROBUST, ids=str)
@pytest.mark.parametrize("huge", [1e6, -1e20])
def test_two_hostile_clients_of_ten_move_it_boundedly(aggregator, huge):
    honest = clients(10)
    lies = [{n: np.full(v.shape, huge) for n, v in s.items()} if i in (0, 6) else s for i, s in enumerate(honest)]
    radius = np.abs(stacked(honest)).max()
    assert np.abs(flat(merged(aggregator, lies))).max() < 2 * radius
    assert np.abs(stacked(lies).mean(0)).max() > 1e5  # where the mean goes


def test_huge_lies_leave_krum_able_to_tell_the_honest_apart():
    honest = [{n: v * 1e-3 for n, v in s.items()} for s in clients(7)]
    lies = [{n: np.full(v.shape, 1e15) for n, v in honest[0].items()}]
    alone = flat(merged(Krum(attackers=0), honest))
    np.testing.assert_array_equal(flat(merged(Krum(attackers=1), [*lies, *honest])), alone)


def test_half_precision_is_computed_in_single_and_complex_numbers_pass():
    states = [{"w": torch.tensor([v], dtype=torch.float16)} for v in (60000.0, 60000.0)]
    assert Median().merge([ClientUpdate(i, s) for i, s in enumerate(states)], MergeContext(), {})[0]["w"] == 60000
    sent = [ClientUpdate(i, {"z": torch.tensor([complex(i, -i)])}) for i in range(3)]
    assert Median().merge(sent, MergeContext(), {})[0]["z"] == torch.tensor([1 - 1j])


def test_krum_leaves_bad_updates_out_and_shares_no_memory():
    pipeline = build_pipeline("krum", {"krum": {"attackers": 1}})
    sent = [ClientUpdate(i, {"w": torch.randn(4, generator=torch.Generator().manual_seed(i))}) for i in range(6)]
    spoilt = [ClientUpdate(9, {"w": torch.full((4,), float("nan"))})]
    context = MergeContext(base={"w": torch.zeros(4)})
    result, without = pipeline.merge([*sent, *spoilt], context), pipeline.merge(sent, context)
    assert torch.equal(result.state["w"], without.state["w"])
    assert [bad.client for bad in result.dropped] == [9]
    assert result.state["w"].data_ptr() not in {u.state["w"].data_ptr() for u in sent}
    with pytest.raises(BadUpdate, match="client 9"):
        build_pipeline("krum", on_bad_update="raise").merge([*sent, *spoilt], context)


def test_too_few_clients_for_krum_are_an_error_that_says_how_many_it_wants():
    with pytest.raises(NoUsableUpdates, match=r"2 attackers wants at least 7 usable updates, got 6: lower attackers"):
        merged(Krum(attackers=2), clients(6))
    assert merged(Krum(attackers=2), clients(7))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TrimmedMean, {"trim": 0.5}),
        (TrimmedMean, {"trim": -0.1}),
        (GeometricMedian, {"smoothing": 0.0}),
        (GeometricMedian, {"iterations": 0}),
        (Krum, {"attackers": -1}),
        (Krum, {"attackers": 1.5}),
        (Krum, {"selected": 0}),
        (NormClipping, {"bound": 0.0}),
        (MedianNormClipping, {"factor": 0.0}),
    ],
)
def test_options_out_of_range(kind, options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        kind(**options)
