"""EMR beside NumPy, and its laws."""

import numpy as np

from tests.aggregators.task_vector_cases import base_of, close, drawn, merge_vectors, own_vectors


def expected(vectors, shares):
    """The paper's algorithm 1: the unified update, and each client's own."""
    names = vectors[0].keys()
    sign = {n: np.where(sum(p * v[n] for p, v in zip(shares, vectors, strict=True)) > 0, 1, -1) for n in names}
    unified = {n: sign[n] * np.max([np.where(v[n] * sign[n] > 0, np.abs(v[n]), 0) for v in vectors], 0) for n in names}
    own = []
    for v in vectors:
        masked = {n: (v[n] * sign[n] > 0) * unified[n] for n in names}
        scale = sum(np.abs(v[n]).mean() for n in names) / sum(np.abs(masked[n]).mean() for n in names)
        own.append({n: scale * masked[n] for n in names})
    return unified, own


def test_as_numpy_has_it():
    vectors = [drawn(i) for i in range(3)]
    for weights, shares in (([1, 1, 1], (1 / 3,) * 3), ([1, 2, 9], (1 / 12, 2 / 12, 9 / 12))):
        merged, result = merge_vectors("emr", vectors, weights)
        unified, own = expected(vectors, shares)
        close(merged, unified)
        for found, wanted in zip(own_vectors(result, base_of()), own, strict=True):
            close(found, wanted, 1e-8)


def test_golden_numbers():
    zero = {"w": np.zeros(4), "b": np.zeros(1)}
    vectors = [
        {"w": np.array([3.0, 1.0, 2.0, 0.0]), "b": np.array([1.0])},
        {"w": np.array([1.0, -2.0, -2.0, 0.0]), "b": np.array([2.0])},
    ]
    merged, result = merge_vectors("emr", vectors, base=zero)
    assert merged["w"].tolist() == [3, -2, -2, 0]  # a sum of zero, at the third place, counts as -1
    assert merged["b"].tolist() == [2]
    assert [part.packed["w"].tolist() for part in result.personal.values()] == [[0b10000000], [0b11100000]]
    # sum over tensors of mean |tau_i|, over that of mean |m_i tau|: (6/4 + 1) / (3/4 + 2), (5/4 + 2) / (7/4 + 2)
    np.testing.assert_allclose([part.scale for part in result.personal.values()], [2.5 / 2.75, 3.25 / 3.75])


def test_one_client_and_equal_clients_get_back_what_they_sent():
    for count in (1, 3):
        merged, result = merge_vectors("emr", [drawn(0)] * count)
        close(merged, drawn(0))
        for found in own_vectors(result, base_of()):
            close(found, drawn(0))


def test_clients_that_moved_other_parameters_get_them_back():
    vectors = [{"w": 2.0 * np.eye(3)[i]} for i in range(3)]
    _, result = merge_vectors("emr", vectors)
    for found, wanted in zip(own_vectors(result, base_of({"w": (3,)})), vectors, strict=True):
        close(found, wanted)


def test_rescaling_keeps_the_mean_size_of_an_update_over_tensors():
    vectors = [drawn(i) for i in range(4)]
    _, result = merge_vectors("emr", vectors)
    for found, sent in zip(own_vectors(result, base_of()), vectors, strict=True):
        np.testing.assert_allclose(
            sum(np.abs(value).mean() for value in found.values()), sum(np.abs(value).mean() for value in sent.values())
        )


def test_clients_that_did_not_move_or_agree_with_nothing_are_no_nan():
    merged, result = merge_vectors("emr", [{"w": np.zeros(3)}] * 2)
    assert (merged["w"] == 0).all()
    assert [part.scale for part in result.personal.values()] == [1, 1]
    _, result = merge_vectors("emr", [{"w": np.array([1.0])}, {"w": np.array([-3.0])}])
    assert own_vectors(result, base_of({"w": (1,)}))[0]["w"] == 0


def test_it_scales_with_the_updates():
    vectors = [drawn(i) for i in range(3)]
    small, result = merge_vectors("emr", [{n: 2.0**-12 * t for n, t in v.items()} for v in vectors])
    plain, other = merge_vectors("emr", vectors)
    close({n: 2.0**12 * t for n, t in small.items()}, plain, 1e-8)
    np.testing.assert_allclose(
        [part.scale for part in result.personal.values()], [part.scale for part in other.personal.values()], rtol=1e-8
    )
