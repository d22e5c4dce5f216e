"""Methods that fold task vectors, against a few lines of NumPy; and the laws that they share."""

from __future__ import annotations

import numpy as np
import pytest

from fedmerge import ClientUpdate, InvalidOption, MergeContext
from fedmerge.aggregators.fedgma import FedGMA
from fedmerge.aggregators.magmax import MagMax
from fedmerge.aggregators.metagpt import MetaGPT
from fedmerge.aggregators.model_stock import ModelStock
from fedmerge.aggregators.task_arithmetic import TaskArithmetic
from fedmerge.edits import delta
from tests.aggregators.golden_numbers import added, check_equal, drawn, flat, merged, rows, tensors

BASE = drawn(0)
VECTORS = [drawn(seed) for seed in range(1, 5)]
CLIENTS = [added(BASE, vector) for vector in VECTORS]
WEIGHTS = [1.0, 2.0, 3.0, 6.0]
SHARES = np.array(WEIGHTS) / 12
EACH = [
    TaskArithmetic(),
    TaskArithmetic(form="sum"),
    MetaGPT(),
    FedGMA(),
    MagMax(scale=1.0),
    ModelStock(),
    ModelStock(scope="row"),
]
MEANS = [one for one in EACH if one != TaskArithmetic(form="sum")]
ALL = pytest.mark.parametrize("method", EACH, ids=str)
ALL_MEANS = pytest.mark.parametrize("method", MEANS, ids=str)


def moved(method, vectors, weights=None):
    """The merged task vector."""
    states = [added(BASE, vector) for vector in vectors]
    return {n: after - BASE[n] for n, after in merged(method, states, weights, BASE).items()}


@pytest.fixture(params=[1 << 20, 5], ids=["whole", "pieces"], autouse=True)
def pieces(request, monkeypatch):
    """Tensors at once, and in pieces that do not divide them."""
    monkeypatch.setattr(delta, "PIECE", request.param)


def by_coordinate(vectors, combine):
    return {name: combine(np.stack([vector[name] for vector in vectors])) for name in vectors[0]}


@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5])
def test_task_arithmetic_by_hand(scale):
    want = by_coordinate(VECTORS, lambda v: scale * np.tensordot(SHARES, v, 1))
    check_equal(moved(TaskArithmetic(scale), VECTORS, WEIGHTS), want)
    check_equal(
        moved(TaskArithmetic(scale, form="sum"), VECTORS, WEIGHTS), {n: len(VECTORS) * v for n, v in want.items()}
    )


def test_a_scale_of_one_in_k_times_the_sum_is_the_mean():
    check_equal(moved(TaskArithmetic(0.25, form="sum"), VECTORS, WEIGHTS), moved(TaskArithmetic(), VECTORS, WEIGHTS))


def test_metagpt_by_hand():
    squares = (rows(VECTORS) ** 2).sum(1)
    factors = SHARES * squares / (SHARES @ squares)
    assert factors.sum() == pytest.approx(1)
    found = moved(MetaGPT(scale=0.5), VECTORS, WEIGHTS)
    check_equal(found, by_coordinate(VECTORS, lambda v: 0.5 * np.tensordot(factors, v, 1)))


def test_metagpt_of_equal_norms_is_the_mean():
    lengths = np.linalg.norm(rows(VECTORS), axis=1)
    equal = [{n: v / length for n, v in vector.items()} for vector, length in zip(VECTORS, lengths, strict=True)]
    check_equal(moved(MetaGPT(), equal, WEIGHTS), moved(TaskArithmetic(), equal, WEIGHTS))


@pytest.mark.parametrize("threshold", [0.0, 0.4, 2 / 3, 1.0])
def test_fedgma_by_hand(threshold):
    def masked(v):
        agreement = np.abs(np.tensordot(SHARES, np.sign(v), 1))
        return 0.5 * np.where(agreement >= threshold - 1e-9, 1, agreement) * np.tensordot(SHARES, v, 1)

    check_equal(moved(FedGMA(0.5, threshold), VECTORS, WEIGHTS), by_coordinate(VECTORS, masked))
    if threshold == 0:
        check_equal(moved(FedGMA(threshold=0.0), VECTORS), moved(TaskArithmetic(), VECTORS))


def test_an_agreement_that_is_the_threshold_is_enough():
    vectors = [{n: np.abs(v) if i < 2 else -0.1 * np.abs(v) for n, v in drawn(i).items()} for i in range(3)]
    check_equal(moved(FedGMA(threshold=1 / 3), vectors), moved(TaskArithmetic(), vectors))


def test_magmax_by_hand():
    largest = by_coordinate(VECTORS, lambda v: np.take_along_axis(v, np.abs(v).argmax(0)[None], 0)[0])
    check_equal(moved(MagMax(), VECTORS, WEIGHTS), {n: 0.5 * v for n, v in largest.items()})
    assert np.linalg.norm(flat(largest)) > np.linalg.norm(rows(VECTORS), axis=1).max()


def test_of_a_change_and_its_opposite_magmax_takes_the_positive_one_in_any_order():
    still = {n: np.zeros(v.shape) for n, v in BASE.items()}
    against = {n: -v for n, v in VECTORS[0].items()}
    want = {n: np.abs(v) for n, v in VECTORS[0].items()}
    check_equal(merged(MagMax(1.0), [VECTORS[0], against], base=still), want)
    check_equal(merged(MagMax(1.0), [against, VECTORS[0]], base=still), want)


def stock_ratio(vectors):
    """t = K c / (1 + (K - 1) c) of rows of equal weights, c their mean cosine."""
    unit = vectors / np.linalg.norm(vectors, axis=1)[:, None]
    k = len(unit)
    cosine = np.clip((unit @ unit.T)[~np.eye(k, dtype=bool)].mean(), 0, 1)
    return k * cosine / (1 + (k - 1) * cosine)


def close_vectors(count):
    """Task vectors that have something in common, as far as none is orthogonal to another."""
    return [{n: 2 * VECTORS[0][n] + v for n, v in drawn(10 + i).items()} for i in range(count)]


@pytest.mark.parametrize("count", [2, 4])
def test_model_stock_by_hand(count):
    vectors = close_vectors(count)
    found = moved(ModelStock(), vectors)
    for name in ("w", "kernel", "b"):
        stacked = np.stack([vector[name] for vector in vectors])
        ratio = stock_ratio(stacked.reshape(count, -1))
        assert 0.1 < ratio < 0.99
        np.testing.assert_allclose(found[name], ratio * stacked.mean(0), rtol=1e-9)
    by_row = moved(ModelStock(scope="row"), vectors)
    stacked = np.stack([vector["w"] for vector in vectors])
    want = np.stack([stock_ratio(stacked[:, row]) * stacked[:, row].mean(0) for row in range(4)])
    np.testing.assert_allclose(by_row["w"], want, rtol=1e-9)
    np.testing.assert_allclose(by_row["b"], found["b"], rtol=1e-9)


def test_two_clients_of_model_stock_go_by_the_angle_between_them():
    one, other = close_vectors(2)
    angle = np.arccos(one["b"] @ other["b"] / np.linalg.norm(one["b"]) / np.linalg.norm(other["b"]))
    ratio = 2 * np.cos(angle) / (1 + np.cos(angle))
    np.testing.assert_allclose(moved(ModelStock(), [one, other])["b"], ratio * (one["b"] + other["b"]) / 2)


def test_model_stock_is_the_nearest_point_to_what_clients_share_whatever_their_weights():
    """Clients are a common direction plus noise, all at right angles: the best point on the line is known."""
    common, noise = np.zeros(16), np.eye(16)[1:4] * 2.0
    common[0] = 3.0
    shares = np.array([0.5, 0.3, 0.2])
    mean = shares @ (common + noise)
    best = (common @ mean) / (mean @ mean)
    sent = [ClientUpdate(i, tensors({"w": common + own}), 10 * shares[i]) for i, own in enumerate(noise)]
    found, _ = ModelStock().merge(sent, MergeContext(base=tensors({"w": np.zeros(16)})), {})
    np.testing.assert_allclose(found["w"].numpy(), best * mean, rtol=1e-12)


def test_clients_that_oppose_each_other_leave_model_stock_at_the_base():
    """The formula would explode where c is near -1 / (K - 1)."""
    vectors = [{n: np.full(v.shape, [1.0, -0.9, 0.01][i]) for n, v in BASE.items()} for i in range(3)]
    check_equal(moved(ModelStock(), vectors), {n: np.zeros(v.shape) for n, v in BASE.items()})


@ALL_MEANS
def test_one_client_and_equal_clients_are_what_comes_out(method):
    for count in (1, 3):
        check_equal(moved(method, [VECTORS[0]] * count, WEIGHTS[:count]), VECTORS[0])


@ALL
def test_clients_that_did_not_move_leave_the_base_and_no_nan(method):
    still = [{n: np.zeros(v.shape) for n, v in BASE.items()}] * 3
    check_equal(merged(method, [BASE] * 3, WEIGHTS[:3], BASE), BASE)
    assert not any(np.isnan(v).any() for v in moved(method, still).values())


@ALL
def test_one_client_among_those_that_did_not_move(method):
    still = {n: np.zeros(v.shape) for n, v in BASE.items()}
    found = moved(method, [still, VECTORS[0], still])
    assert all(np.isfinite(v).all() for v in found.values())
    want = {  # of which share of its update is left
        "TaskArithmetic": 1 / 3 if method == TaskArithmetic() else 1.0,
        "MetaGPT": 1.0,
        "FedGMA": 1 / 9,  # a third of the clients agree on a third of the update
        "MagMax": 1.0,
        "ModelStock": 0.0,  # who did not move agrees with nobody
    }[type(method).__name__]
    check_equal(found, {n: want * v for n, v in VECTORS[0].items()})


@ALL
def test_disjoint_supports(method):
    """Each client moves its own coordinates: none is lost, and who moved it settles each."""
    mask = np.random.default_rng(5).integers(0, 3, size=len(flat(BASE)))
    apart, place = [{} for _ in range(3)], 0
    for name, array in BASE.items():
        own = mask[place : place + array.size].reshape(array.shape)
        place += array.size
        for client, state in enumerate(apart):
            state[name] = np.where(own == client, VECTORS[client][name], 0.0)
    found = moved(method, apart)
    together = added({n: np.zeros(v.shape) for n, v in BASE.items()}, *apart)
    squares = (rows(apart) ** 2).sum(1)
    factor = {
        "TaskArithmetic": 1 / 3 if method == TaskArithmetic() else 1.0,
        "FedGMA": 1 / 9,
        "MagMax": 1.0,
        "ModelStock": 0.0,
    }.get(type(method).__name__)
    if factor is None:
        shares = squares / squares.sum()
        want = added({n: np.zeros(v.shape) for n, v in BASE.items()}, *(
            {n: shares[i] * v for n, v in state.items()} for i, state in enumerate(apart)
        ))  # fmt: skip
    else:
        want = {n: factor * v for n, v in together.items()}
    check_equal(found, want)


@ALL
@pytest.mark.parametrize("factor", [1e-3, 50.0])
def test_a_common_scale_passes_through_all(method, factor):
    scaled = [{n: factor * v for n, v in vector.items()} for vector in VECTORS]
    want = {n: factor * v for n, v in moved(method, VECTORS, WEIGHTS).items()}
    check_equal(moved(method, scaled, WEIGHTS), want, rtol=1e-7, atol=1e-9 * factor)


@ALL
def test_the_order_of_clients_does_not_matter(method):
    want = moved(method, VECTORS, WEIGHTS)
    for order in ([3, 0, 2, 1], [1, 3, 0, 2]):
        found = moved(method, [VECTORS[i] for i in order], [WEIGHTS[i] for i in order])
        check_equal(found, want)


@ALL
def test_a_negative_weight_turns_the_task_vector_round(method):
    turned = [{n: -v for n, v in VECTORS[0].items()}, *VECTORS[1:]]
    found = moved(method, VECTORS, [-1.0, 2.0, 3.0, 6.0])
    want = moved(method, turned, WEIGHTS)
    if method == TaskArithmetic():  # whose mean divides by the sum of the weights, 10 instead of 12
        want = {n: 1.2 * v for n, v in want.items()}
    check_equal(found, want)


@ALL
def test_a_base_is_asked_for(method):
    with pytest.raises(InvalidOption, match=r"pass base="):
        merged(method, CLIENTS)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TaskArithmetic, {"form": "max"}),
        (TaskArithmetic, {"scale": float("nan")}),
        (MagMax, {"scale": float("inf")}),
        (FedGMA, {"threshold": 1.1}),
        (FedGMA, {"threshold": -0.1}),
        (ModelStock, {"scope": "layer"}),
    ],
)
def test_options_out_of_range_are_named(kind, options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        kind(**options)
