"""TIES in the forms of four implementations, each written out in NumPy, and its laws."""

from __future__ import annotations

import numpy as np
import pytest

from fedmerge import ClientUpdate, InvalidOption, MergeContext
from fedmerge.aggregators.task_arithmetic import TaskArithmetic
from fedmerge.aggregators.ties import Ties
from fedmerge.edits import delta
from fedmerge.edits.trim import keep_largest
from fedmerge.merging import build_pipeline
from tests.aggregators.golden_numbers import SHAPES, added, check_equal, drawn, flat, merged, rows, tensors

BASE = {name: np.zeros(shape) for name, shape in SHAPES.items()}
VECTORS = [drawn(seed) for seed in range(1, 6)]
WEIGHTS = np.array([1.0, 2.0, 3.0, 6.0, 4.0])
NAMES = [name for name in SHAPES if name != "none"]


@pytest.fixture(params=[1 << 20, 5], ids=["whole", "pieces"], autouse=True)
def pieces(request, monkeypatch):
    """Tensors at once, and in pieces that do not divide them."""
    monkeypatch.setattr(delta, "PIECE", request.param)


def moved(method, vectors=VECTORS, weights=None):
    return merged(method, vectors, None if weights is None else list(weights), BASE)


def trimmed(row, density):
    """The largest share of one row, others 0."""
    count = round(density * row.size)
    keep = np.argsort(-np.abs(row), kind="stable")[:count]
    return np.where(np.isin(np.arange(row.size), keep), row, 0.0)


def authors(vectors, density):
    """All in one row; undecided signs are those of the majority; a mean by count."""
    t = np.stack([trimmed(row, density) for row in rows(vectors)])
    sign = np.sign(t.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    agree = np.where(sign > 0, t > 0, t < 0)
    return (t * agree).sum(0) / np.maximum(agree.sum(0), 1)


def fusion_bench(vectors, density):
    """The same, with a sum."""
    t = np.stack([trimmed(row, density) for row in rows(vectors)])
    sign = np.sign(t.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    return 0.3 * (t * np.where(sign > 0, t > 0, t < 0)).sum(0)


def mergekit(tensor, weights, density):
    """One tensor of all; weights elect, and divide; undecided signs are positive."""
    t = np.stack([trimmed(row, density) for row in tensor])
    weighted = weights[:, None] * t
    sign = np.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(weighted) == sign
    divisor = (weights[:, None] * agree).sum(0)
    return (weighted * agree).sum(0) / np.where(divisor == 0, 1.0, divisor)


def peft(tensor, weights, density):
    """One tensor of all; signs are elected without weights, what is summed has them, and a count divides."""
    t = np.stack([trimmed(row, density) for row in tensor])
    sign = np.where(t.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(t) == sign
    return (weights[:, None] * t * agree).sum(0) / np.maximum(agree.sum(0), 1)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_the_authors_form(density):
    found = flat(moved(Ties(density=density, disjoint="mean_by_count")))
    np.testing.assert_allclose(found, authors(VECTORS, density), rtol=1e-9)
    assert (found != 0).mean() == pytest.approx(1.0 if density == 1 else 0.75, abs=0.25)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_fusion_benchs_form(density):
    found = flat(moved(Ties(scale=0.3, density=density, disjoint="sum")))
    np.testing.assert_allclose(found, fusion_bench(VECTORS, density), rtol=1e-9)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize(
    ("form", "options"),
    [
        (mergekit, {"undecided": "positive"}),
        (peft, {"undecided": "positive", "elect": "unweighted", "disjoint": "mean_by_count"}),
    ],
)
def test_the_forms_of_mergekit_and_peft(form, options, density):
    found = moved(Ties(density=density, scope="tensor", **options), weights=WEIGHTS)
    for name in NAMES:
        tensor = np.stack([v[name].ravel() for v in VECTORS])
        want = form(tensor, WEIGHTS / WEIGHTS.mean(), density)
        np.testing.assert_allclose(found[name].ravel(), want, rtol=1e-9, err_msg=name)


def test_weights_and_their_absence_elect_different_signs():
    vectors = [{"w": np.array([3.0])}, {"w": np.array([-1.0])}, {"w": np.array([-1.0])}]
    base = {"w": np.zeros(1)}
    for options, want in (
        ({}, -1.0),
        ({"elect": "unweighted"}, 3.0),
        ({"elect": "unweighted", "disjoint": "mean_by_count"}, 3.0 * 3 * 0.1),
        ({"disjoint": "mean_by_count"}, -1.0 * 3 * 0.9 / 2),
        ({"disjoint": "sum"}, -1.0 * 3 * 0.9),
    ):
        found = merged(Ties(density=1.0, **options), vectors, [1.0, 4.0, 5.0], base)["w"]
        assert found == pytest.approx(want), options


def test_where_changes_cancel_the_majority_of_all_coordinates_decides():
    for majority in (1.0, -1.0):
        vectors = [{"w": np.array([2.0, majority, majority])}, {"w": np.array([-2.0, majority, majority])}]
        base = {"w": np.zeros(3)}
        assert merged(Ties(density=1.0), vectors, base=base)["w"].tolist() == [2.0 * majority, majority, majority]
        positive = merged(Ties(density=1.0, undecided="positive"), vectors, base=base)["w"]
        assert positive.tolist() == [2.0, majority, majority]
    even = [{"w": np.array([2.0])}, {"w": np.array([-2.0])}]
    assert merged(Ties(density=1.0), even, base={"w": np.zeros(1)})["w"].tolist() == [2.0]


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [0.1, 0.35, 0.7])
def test_one_client_alone_is_trimmed_as_the_edit_does(scope, density):
    found = moved(Ties(density=density, scope=scope), VECTORS[:1])
    want = keep_largest(tensors(VECTORS[0]), density, scope)
    check_equal(found, {n: t.numpy() for n, t in want.items()})


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_equal_magnitudes_are_kept_from_the_front_in_exactly_their_share(scope):
    draw = np.random.default_rng(3)
    coarse = {n: np.round(2 * draw.normal(size=s)) / 2 for n, s in SHAPES.items()}
    for density in (0.3, 0.6, 0.95):
        found = moved(Ties(density=density, scope=scope), [coarse])
        want = keep_largest(tensors(coarse), density, scope)
        check_equal(found, {n: t.numpy() for n, t in want.items()})


def test_the_edit_before_it_gives_the_same_as_its_own_trimming():
    sent = [ClientUpdate(i, tensors(v), WEIGHTS[i]) for i, v in enumerate(VECTORS)]
    context = MergeContext(base=tensors(BASE))
    own = build_pipeline("ties(density=0.3)").merge(sent, context).state
    edited = build_pipeline("trim(density=0.3)+ties(density=1)").merge(sent, context).state
    check_equal({n: t.numpy() for n, t in own.items()}, {n: t.numpy() for n, t in edited.items()})


def test_at_density_1_with_agreeing_signs_it_is_the_mean():
    signs = {n: np.sign(v) for n, v in VECTORS[0].items()}
    agreeing = [{n: signs[n] * np.abs(v[n]) for n in v} for v in VECTORS]
    want = moved(TaskArithmetic(), agreeing, WEIGHTS)
    check_equal(moved(Ties(density=1.0), agreeing, WEIGHTS), want)
    check_equal(
        moved(Ties(density=1.0, disjoint="sum"), agreeing, WEIGHTS), {n: len(VECTORS) * v for n, v in want.items()}
    )


def test_of_two_opposite_models_the_larger_is_left_undivided():
    opposite = {n: -0.5 * v for n, v in VECTORS[0].items()}
    check_equal(moved(Ties(density=1.0), [VECTORS[0], opposite]), VECTORS[0])


def test_the_result_never_opposes_the_sum_of_what_is_left():
    for density in (0.2, 1.0):
        left = np.stack([trimmed(row, density) for row in rows(VECTORS)])
        assert (flat(moved(Ties(density=density))) * left.sum(0) >= 0).all()


@pytest.mark.parametrize("disjoint", ["mean", "mean_by_count", "sum"])
def test_identical_disjoint_and_absent_changes(disjoint):
    method = Ties(density=1.0, disjoint=disjoint)
    equal = 3.0 if disjoint == "sum" else 1.0
    check_equal(moved(method, [VECTORS[0]] * 3), {n: equal * v for n, v in VECTORS[0].items()})
    check_equal(moved(method, VECTORS[:1]), VECTORS[0])
    apart = [{n: np.where(np.arange(v.size).reshape(v.shape) % 3 == i, v, 0.0) for n, v in VECTORS[i].items()}
             for i in range(3)]  # fmt: skip
    check_equal(moved(method, apart), added(*apart))
    for density in (0.2, 1.0):
        still = moved(Ties(density=density, disjoint=disjoint), [BASE] * 3)
        check_equal(still, BASE)


@pytest.mark.parametrize("factor", [1e-3, 50.0])
@pytest.mark.parametrize("method", [Ties(), Ties(scope="tensor", disjoint="sum")], ids=str)
def test_scale_order_and_negative_weights(method, factor):
    want = moved(method, VECTORS, WEIGHTS)
    scaled = [{n: factor * v for n, v in vector.items()} for vector in VECTORS]
    check_equal(moved(method, scaled, WEIGHTS), {n: factor * v for n, v in want.items()}, rtol=1e-7)
    check_equal(moved(method, VECTORS[::-1], WEIGHTS[::-1]), want)
    turned = [{n: -v for n, v in VECTORS[0].items()}, *VECTORS[1:]]
    check_equal(moved(method, VECTORS, WEIGHTS * [-1, 1, 1, 1, 1]), moved(method, turned, WEIGHTS))


def test_the_trim_of_tensors_and_of_the_whole_differ():
    assert not np.allclose(flat(moved(Ties(scope="tensor"))), flat(moved(Ties())))


@pytest.mark.parametrize(
    "options",
    [{"density": 0.0}, {"density": 1.1}, {"scope": "row"}, {"elect": "mean"}, {"disjoint": "max"}, {"undecided": "no"}],
    ids=str,
)
def test_options_of_ties_out_of_range_are_named(options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        Ties(**options)
