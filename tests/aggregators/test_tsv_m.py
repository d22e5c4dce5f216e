"""TSV-M beside NumPy, and its laws."""

import numpy as np
import pytest

from fedmerge.errors import InvalidOption
from fedmerge.merging import build_pipeline
from tests.aggregators.task_vector_cases import close, drawn, merge_vectors


def nearest_orthonormal(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def joined(matrices, most, factors):
    """The paper's algorithm 1 for one matrix."""
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    left = np.concatenate([part[0][:, :most] for part in parts], 1)
    values = np.concatenate([factor * part[1][:most] for part, factor in zip(parts, factors, strict=True)])
    right = np.concatenate([part[2][:most] for part in parts], 0)
    return nearest_orthonormal(left) @ np.diag(values) @ nearest_orthonormal(right)


def expected(vectors, shares, kept, scale=1.0):
    wanted = {}
    for name, first in vectors[0].items():
        if first.ndim >= 2:
            matrices = [v[name].reshape(len(first), -1) for v in vectors]
            most = max(1, int(min(matrices[0].shape) * kept))
            wanted[name] = joined(matrices, most, [len(vectors) * p for p in shares]).reshape(first.shape)
        else:
            wanted[name] = sum(p * v[name] for p, v in zip(shares, vectors, strict=True))
    return {name: scale * value for name, value in wanted.items()}


def test_as_numpy_has_it():
    vectors = [drawn(i) for i in range(2)]
    close(merge_vectors("tsv_m", vectors)[0], expected(vectors, (0.5, 0.5), 0.5))


def test_every_option_moves_the_result():
    vectors = [drawn(i) for i in range(2)]
    close(merge_vectors("tsv_m(kept=0.3)", vectors)[0], expected(vectors, (0.5, 0.5), 0.3))
    close(merge_vectors("tsv_m(kept=1,scale=0.7)", vectors, [1, 3])[0], expected(vectors, (0.25, 0.75), 1.0, 0.7))
    assert not np.allclose(
        expected(vectors, (0.5, 0.5), 0.3)["layer.weight"], expected(vectors, (0.5, 0.5), 0.5)["layer.weight"]
    )


def test_one_client_gets_its_own_model():
    close(merge_vectors("tsv_m", [drawn(0)])[0], drawn(0))


def test_updates_in_other_directions_are_added():
    generator = np.random.default_rng(1)
    left, right = (np.linalg.qr(generator.normal(size=(6, 6)))[0] for _ in range(2))
    vectors = [{"w": left[:, i : i + 2] @ np.diag([3.0, 2.0]) @ right[:, i : i + 2].T} for i in (0, 2, 4)]
    close(merge_vectors("tsv_m", vectors)[0], {"w": sum(v["w"] for v in vectors)})


def test_equal_updates_give_one_of_them_cut_to_its_share_of_the_rank():
    vector = drawn(0)
    left, values, right = np.linalg.svd(vector["layer.weight"], full_matrices=False)
    merged, _ = merge_vectors("tsv_m", [vector] * 2)
    np.testing.assert_allclose(merged["layer.weight"], left[:, :2] * values[:2] @ right[:2], atol=1e-7)
    np.testing.assert_allclose(merged["layer.bias"], vector["layer.bias"], atol=1e-12)


def test_of_a_small_matrix_every_client_keeps_one_direction():
    vectors = [drawn(i, {"w": (2, 7)}) for i in range(5)]
    merged, _ = merge_vectors("tsv_m", vectors)
    close(merged, {"w": joined([v["w"] for v in vectors], 1, [1.0] * 5)})


def test_a_client_that_did_not_move_leaves_the_others_directions_alone():
    moved, still = drawn(0), {name: 0 * value for name, value in drawn(0).items()}
    left, values, right = np.linalg.svd(moved["layer.weight"], full_matrices=False)
    merged, _ = merge_vectors("tsv_m", [moved, still])
    np.testing.assert_allclose(merged["layer.weight"], left[:, :2] * values[:2] @ right[:2], atol=1e-9)
    merged, _ = merge_vectors("tsv_m", [still] * 3)
    assert all((value == 0).all() for value in merged.values())


def test_it_scales_with_the_updates():
    vectors = [drawn(i) for i in range(3)]
    small, _ = merge_vectors("tsv_m", [{n: 1e-4 * t for n, t in v.items()} for v in vectors])
    close({n: 1e4 * t for n, t in small.items()}, merge_vectors("tsv_m", vectors)[0], 1e-8)


@pytest.mark.parametrize(("option", "value"), [("kept", 0.0), ("kept", 1.1), ("scale", -1.0)])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(InvalidOption, match=f"{option} must lie in"):
        build_pipeline("tsv_m", {"tsv_m": {option: value}})
