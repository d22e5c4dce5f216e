"""Iso-C beside NumPy, and its laws."""

import numpy as np
import pytest

from fedmerge.errors import InvalidOption
from fedmerge.merging import build_pipeline
from tests.aggregators.task_vector_cases import close, drawn, merge_vectors


def evened(total):
    """The paper's equations 5 to 7 for one tensor."""
    left, values, right = np.linalg.svd(total.reshape(len(total), -1), full_matrices=False)
    return (left @ (values.mean() * np.eye(len(values))) @ right).reshape(total.shape)


def expected(vectors, shares, scale=1.0):
    count = len(vectors)
    means = {name: sum(p * v[name] for p, v in zip(shares, vectors, strict=True)) for name in vectors[0]}
    return {name: scale * (evened(count * mean) if mean.ndim >= 2 else mean) for name, mean in means.items()}


def test_as_numpy_has_it():
    vectors = [drawn(i) for i in range(3)]
    close(merge_vectors("iso_c", vectors)[0], expected(vectors, (1 / 3, 1 / 3, 1 / 3)))
    close(merge_vectors("iso_c(scale=0.5)", vectors, [1, 2, 5])[0], expected(vectors, (1 / 8, 2 / 8, 5 / 8), 0.5))


def test_a_golden_number():
    first, second = np.diag([3.0, 1.0]), np.diag([1.0, 1.0])
    merged, _ = merge_vectors("iso_c", [{"w": first}, {"w": second}])
    np.testing.assert_allclose(merged["w"], np.diag([3.0, 3.0]), atol=1e-9)  # of the sum diag(4, 2)


def test_all_directions_of_a_matrix_have_one_strength_and_their_sum_stays():
    vectors = [drawn(i) for i in range(4)]
    merged, _ = merge_vectors("iso_c", vectors)
    total = sum(v["layer.weight"] for v in vectors)
    values = np.linalg.svd(merged["layer.weight"], compute_uv=False)
    np.testing.assert_allclose(values, values[0], rtol=1e-9)
    np.testing.assert_allclose(values.sum(), np.linalg.svd(total, compute_uv=False).sum(), rtol=1e-9)


def test_an_orthogonal_update_comes_back_as_it_is():
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    close(merge_vectors("iso_c", [{"w": 0.3 * turn}])[0], {"w": 0.3 * turn})


def test_it_scales_with_the_updates():
    vectors = [drawn(i) for i in range(3)]
    small, _ = merge_vectors("iso_c", [{n: 1e-4 * t for n, t in v.items()} for v in vectors])
    close({n: 1e4 * t for n, t in small.items()}, merge_vectors("iso_c", vectors)[0], 1e-8)


def test_inputs_that_no_client_has_seen_stay_as_they_were():
    vectors = [drawn(i, {"w": (6, 5)}) for i in range(3)]
    for vector in vectors:
        vector["w"][:, 2] = 0
        vector["w"][4] = 0
    merged, _ = merge_vectors("iso_c", vectors)
    np.testing.assert_allclose(merged["w"][:, 2], 0, atol=1e-12)
    np.testing.assert_allclose(merged["w"][4], 0, atol=1e-12)
    assert np.abs(merged["w"]).max() > 0.1


def test_nothing_moved_is_no_nan():
    merged, _ = merge_vectors("iso_c", [{n: 0 * t for n, t in drawn(0).items()}] * 2)
    assert all((value == 0).all() for value in merged.values())


@pytest.mark.parametrize("scale", [-0.1, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(InvalidOption, match="scale must lie in"):
        build_pipeline("iso_c", {"iso_c": {"scale": scale}})
