"""Consensus merging beside NumPy, and its laws."""

import numpy as np
import pytest

from fedmerge.errors import InvalidOption
from fedmerge.merging import build_pipeline
from tests.aggregators.task_vector_cases import close, drawn, merge_vectors


def expected(vectors, shares, threshold, agreeing, scale):
    """The paper's equation 6, of the sum in which a client counts by its share."""
    wanted = {}
    for name in vectors[0]:
        terms = [len(vectors) * p * v[name] for p, v in zip(shares, vectors, strict=True)]
        total = sum(terms)
        needing = sum((np.abs(term) > threshold * np.abs(total - term)).astype(int) for term in terms)
        wanted[name] = scale * np.where(needing >= agreeing, total, 0)
    return wanted


def test_as_numpy_has_it():
    vectors = [drawn(i) for i in range(4)]
    close(merge_vectors("consensus", vectors)[0], expected(vectors, (0.25,) * 4, 0.4, 2, 0.25))


@pytest.mark.parametrize(
    ("threshold", "agreeing", "scale"), [(0.2, 2, 1.0), (0.6, 1, 0.3), (0.4, 3, 1.0), (0.0, 0, 2.0)]
)
def test_every_option_moves_the_result(threshold, agreeing, scale):
    vectors, shares = [drawn(i) for i in range(4)], (0.1, 0.2, 0.3, 0.4)
    merged, _ = merge_vectors(
        f"consensus(threshold={threshold},agreeing={agreeing},scale={scale})", vectors, [1, 2, 3, 4]
    )
    wanted = expected(vectors, shares, threshold, agreeing, scale)
    close(merged, wanted)
    usual = expected(vectors, shares, 0.4, 2, 0.25)
    assert any(not np.allclose(wanted[name], usual[name]) for name in wanted)


def test_golden_numbers():
    vectors = [{"w": np.array(v)} for v in ([4.0, 1.0, 1.0, 0.0], [4.0, 0.0, -3.0, 0.0], [-1.0, 0.0, 1.0, 0.0])]
    merged, _ = merge_vectors("consensus(threshold=0.5,scale=1)", vectors)
    # |4| > |3| / 2 twice; one client alone; |1| > |-2| / 2 fails twice and |-3| holds; nobody.
    np.testing.assert_allclose(merged["w"], [7, 0, 0, 0], atol=1e-12)


def test_with_none_needed_it_is_task_arithmetic_and_with_too_many_the_base():
    vectors = [drawn(i) for i in range(3)]
    total = {name: sum(v[name] for v in vectors) for name in vectors[0]}
    close(merge_vectors("consensus(agreeing=0,scale=1)", vectors)[0], total)
    close(merge_vectors("consensus(agreeing=4)", vectors)[0], {name: 0 * value for name, value in total.items()})


def test_the_first_entry_at_the_threshold_is_left_out():
    vectors = [{"w": np.array([1.0])}, {"w": np.array([2.0])}]
    zero = {"w": np.array([0.0])}
    assert merge_vectors("consensus(threshold=0.5)", vectors, base=zero)[0]["w"] == 0
    assert merge_vectors("consensus(threshold=0.49)", vectors, base=zero)[0]["w"] == 1.5


def test_equal_updates_survive_while_others_together_stay_below():
    for count, moved in ((3, True), (4, False)):  # 1 > 0.4 * (count - 1)
        merged, _ = merge_vectors("consensus", [drawn(0)] * count)
        close(merged, {name: value * moved for name, value in drawn(0).items()})


def test_disjoint_supports_agree_on_nothing():
    vectors = [{"w": np.eye(3)[i]} for i in range(3)]
    assert (merge_vectors("consensus", vectors)[0]["w"] == 0).all()
    close(merge_vectors("consensus(agreeing=1,scale=1)", vectors)[0], {"w": np.ones(3)})


def test_it_scales_with_the_updates():
    vectors = [drawn(i) for i in range(3)]
    small, _ = merge_vectors("consensus", [{n: 2.0**-12 * t for n, t in v.items()} for v in vectors])
    close({n: 2.0**12 * t for n, t in small.items()}, merge_vectors("consensus", vectors)[0], 1e-8)


@pytest.mark.parametrize(("option", "value"), [("threshold", -0.1), ("agreeing", -1), ("scale", -1.0)])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(InvalidOption, match=f"{option} must lie in"):
        build_pipeline("consensus", {"consensus": {option: value}})
