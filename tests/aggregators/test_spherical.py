"""Means along great circles, against formulas written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from fedmerge import InvalidOption
from fedmerge.aggregators import pieces
from fedmerge.aggregators.karcher import Karcher
from fedmerge.aggregators.multislerp import MultiSlerp
from fedmerge.aggregators.slerp import Slerp
from tests.aggregators.golden_numbers import added, check_equal, drawn, flat, merged

STATES = [drawn(seed) for seed in range(4)]
WEIGHTS = [1.0, 2.0, 3.0, 6.0]


@pytest.fixture(params=[1 << 22, 7], ids=["whole", "pieces"], autouse=True)
def numbers(request, monkeypatch):
    """Tensors at once, and a coordinate or a few at a time."""
    monkeypatch.setattr(pieces, "_NUMBERS", request.param)


def unit(vector):
    return vector / np.linalg.norm(vector)


def arc(a, b, t):
    """Shoemake's formula."""
    angle = np.arccos(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def karcher(vectors, weights, steps):
    """The mean direction of rows, by steps in the space itself, as long as they are on average."""
    shares = np.array(weights) / np.sum(weights)
    directions = np.stack([unit(v) for v in vectors])
    mean = unit(shares @ directions)
    for _ in range(steps):
        angles = np.arccos(directions @ mean)
        logs = (angles / np.sin(angles))[:, None] * (directions - np.cos(angles)[:, None] * mean)
        step = shares @ logs
        size = np.linalg.norm(step)
        mean = np.cos(size) * mean + np.sin(size) * step / size if size > 1e-12 else mean
    return shares @ np.linalg.norm(vectors, axis=1) * mean


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_by_hand(t):
    a, b = STATES[:2]
    found = merged(Slerp(t=t), [a, b])
    for name in ("w", "kernel", "b"):
        np.testing.assert_allclose(found[name], arc(a[name], b[name], t), rtol=1e-9)
    np.testing.assert_allclose(found["temperature"], (1 - t) * a["temperature"] + t * b["temperature"])
    whole = merged(Slerp(t=t, scope="model"), [a, b])
    np.testing.assert_allclose(flat(whole), arc(flat(a), flat(b), t), rtol=1e-9)


def test_the_place_on_the_arc_is_the_second_clients_share_where_none_is_given():
    check_equal(merged(Slerp(), STATES[:2], [1.0, 3.0]), merged(Slerp(t=0.75), STATES[:2]))


def test_slerp_of_updates_goes_between_them_and_not_between_models():
    base, (a, b) = STATES[3], STATES[:2]
    found = merged(Slerp(t=0.25, of="updates"), [added(base, a), added(base, b)], base=base)
    np.testing.assert_allclose(found["b"] - base["b"], arc(a["b"], b["b"], 0.25), rtol=1e-9)


@pytest.mark.parametrize("t", [0.2, 0.5])
def test_equal_lengths_are_kept(t):
    a, b = ({n: v / max(np.linalg.norm(v), 1e-9) for n, v in state.items()} for state in STATES[:2])
    found = merged(Slerp(t=t), [a, b])
    assert all(np.linalg.norm(found[name]) == pytest.approx(1.0, abs=1e-9) for name in ("w", "kernel", "b"))


def test_models_on_one_line_are_interpolated_linearly():
    a = STATES[0]
    for factor in (1.0, 3.0, -2.0, 0.0):
        b = {n: factor * v for n, v in a.items()}
        check_equal(merged(Slerp(t=0.25), [a, b]), {n: (0.75 + 0.25 * factor) * v for n, v in a.items()}, atol=1e-7)


def test_more_than_two_go_by_multislerp_unless_they_are_refused_or_a_place_is_given():
    check_equal(merged(Slerp(), STATES[:3], WEIGHTS[:3]), merged(MultiSlerp(), STATES[:3], WEIGHTS[:3]))
    for method, option in ((Slerp(more="refuse"), "more=refuse"), (Slerp(t=0.5), "t=0.5")):
        with pytest.raises(
            InvalidOption, match=rf"two models, got 3: leave out {option}, or take multislerp or karcher"
        ):
            merged(method, STATES[:3])
    check_equal(merged(Slerp(more="refuse"), STATES[:2]), merged(Slerp(), STATES[:2]))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("method", "steps"), [(MultiSlerp, 1), (Karcher, 10)])
def test_mean_directions_by_hand(method, steps, count):
    found = merged(method(), STATES[:count], WEIGHTS[:count])
    whole = merged(method(scope="model"), STATES[:count], WEIGHTS[:count])
    for name in ("w", "kernel", "b"):
        want = karcher(np.stack([s[name].ravel() for s in STATES[:count]]), WEIGHTS[:count], steps)
        np.testing.assert_allclose(found[name].ravel(), want, rtol=2e-4, atol=2e-4)
        if method is MultiSlerp:
            np.testing.assert_allclose(found[name].ravel(), want, rtol=1e-9)
    want = karcher(np.stack([flat(s) for s in STATES[:count]]), WEIGHTS[:count], steps)
    np.testing.assert_allclose(flat(whole), want, rtol=2e-4, atol=2e-4)


def test_karcher_ends_where_the_pulls_cancel():
    near = [{n: 3 * STATES[0][n] + v for n, v in state.items()} for state in STATES]
    found = merged(Karcher(iterations=200, tolerance=0.0), near, WEIGHTS)["w"].ravel()
    mean, directions = unit(found), np.stack([unit(s["w"].ravel()) for s in near])
    angles = np.arccos(directions @ mean)
    logs = (angles / np.sin(angles))[:, None] * (directions - np.cos(angles)[:, None] * mean)
    np.testing.assert_allclose(np.array(WEIGHTS) @ logs, 0, atol=1e-8)
    first = merged(MultiSlerp(), near, WEIGHTS)["w"].ravel()
    assert 1e-9 < np.linalg.norm(first - found) < 0.05 * np.linalg.norm(found)


def test_tolerance_stops_early():
    far = merged(Karcher(tolerance=10.0), STATES, WEIGHTS)["w"].ravel()
    vectors, shares = np.stack([s["w"].ravel() for s in STATES]), np.array(WEIGHTS) / 12
    directions = vectors / np.linalg.norm(vectors, axis=1)[:, None]
    np.testing.assert_allclose(far, shares @ np.linalg.norm(vectors, axis=1) * unit(shares @ directions), rtol=1e-9)


@pytest.mark.parametrize("method", [MultiSlerp(), Karcher()], ids=str)
def test_two_clients_of_equal_lengths_and_weights_give_slerp(method):
    a, b = ({n: 2 * v / max(np.linalg.norm(v), 1e-9) for n, v in state.items()} for state in STATES[:2])
    want = merged(Slerp(t=0.5), [a, b])
    found = merged(method, [a, b])
    for name in ("w", "kernel", "b"):
        np.testing.assert_allclose(found[name], want[name], rtol=1e-7)


@pytest.mark.parametrize("of", ["weights", "updates"])
@pytest.mark.parametrize("kind", [Slerp, MultiSlerp, Karcher])
def test_one_client_equal_clients_and_those_that_did_not_move(kind, of):
    base, one = STATES[3], STATES[0]
    for count in (1, 2):
        check_equal(merged(kind(of=of), [one] * count, WEIGHTS[:count], base), one, atol=1e-7)
        check_equal(merged(kind(of=of), [base] * count, WEIGHTS[:count], base), base, atol=1e-7)


@pytest.mark.parametrize("method", [MultiSlerp(of="updates"), Karcher(of="updates")], ids=str)
def test_who_did_not_move_shortens_the_mean_and_does_not_turn_it(method):
    base, vector = STATES[3], STATES[0]
    found = merged(method, [added(base, vector), base], [3.0, 1.0], base)
    check_equal({n: v - base[n] for n, v in found.items()}, {n: 0.75 * v for n, v in vector.items()}, atol=1e-7)


@pytest.mark.parametrize("method", [MultiSlerp(), Karcher()], ids=str)
def test_opposite_models_have_no_direction_between_and_are_averaged(method):
    against = {n: -v for n, v in STATES[0].items()}
    found = merged(method, [STATES[0], against], [3.0, 1.0])
    check_equal(found, {n: 0.5 * v for n, v in STATES[0].items()})


@pytest.mark.parametrize("method", [Slerp(), MultiSlerp(), Karcher()], ids=str)
def test_orthogonal_updates_keep_their_length(method):
    """Where the mean of K of them is shorter by the root of K."""
    states = [{"w": 2.0 * np.eye(3)[i]} for i in range(3)]
    assert np.linalg.norm(merged(method, states)["w"]) == pytest.approx(2.0)
    assert np.linalg.norm(np.mean([s["w"] for s in states], 0)) == pytest.approx(2 / np.sqrt(3))


@pytest.mark.parametrize("method", [Slerp(), MultiSlerp(), Karcher()], ids=str)
@pytest.mark.parametrize("factor", [1e-4, 300.0])
def test_a_common_scale_passes_through_and_the_order_does_not_matter(method, factor):
    scaled = [{n: factor * v for n, v in state.items()} for state in STATES]
    want = {n: factor * v for n, v in merged(method, STATES, WEIGHTS).items()}
    check_equal(merged(method, scaled, WEIGHTS), want, rtol=1e-7)
    check_equal(merged(method, scaled[::-1], WEIGHTS[::-1]), want, rtol=1e-7)


def test_updates_want_a_base():
    with pytest.raises(InvalidOption, match="pass base="):
        merged(Karcher(of="updates"), STATES)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Slerp, {"t": 1.5}),
        (Slerp, {"more": "mean"}),
        (Slerp, {"of": "deltas"}),
        (MultiSlerp, {"scope": "row"}),
        (Karcher, {"iterations": 0}),
        (Karcher, {"tolerance": -1.0}),
    ],
)
def test_spherical_options_out_of_range_are_named(kind, options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        kind(**options)
