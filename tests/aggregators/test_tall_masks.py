"""TALL masks beside NumPy, and their laws."""

import numpy as np
import pytest

from fedmerge.errors import InvalidOption
from fedmerge.merging import build_pipeline
from tests.aggregators.task_vector_cases import base_of, close, drawn, merge_vectors, own_vectors


def expected(vectors, shares, threshold):
    """The paper's equations 3 and 5, of terms that count by their shares."""
    own = []
    for i, share in enumerate(shares):
        own.append({})
        for name in vectors[0]:
            terms = [p * v[name] for p, v in zip(shares, vectors, strict=True)]
            total = sum(terms)
            mask = np.abs(terms[i]) > threshold * np.abs(total - terms[i])
            own[-1][name] = mask * total / share
    return own


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.6])
def test_models_of_clients_as_numpy_has_them(threshold):
    vectors = [drawn(i) for i in range(3)]
    for weights, shares in (([1, 1, 1], (1 / 3,) * 3), ([1, 2, 5], (1 / 8, 2 / 8, 5 / 8))):
        _, result = merge_vectors(f"tall_masks(threshold={threshold})", vectors, weights)
        for found, wanted in zip(own_vectors(result, base_of()), expected(vectors, shares, threshold), strict=True):
            close(found, wanted, 1e-8)


def test_golden_bits():
    vectors = [{"w": np.array([3.0, 1.0, 0.0, 1.0])}, {"w": np.array([1.0, 3.0, 2.0, -1.0])}]
    zero = {"w": np.zeros(4)}
    _, result = merge_vectors("tall_masks(threshold=0.5)", vectors, base=zero)
    assert [result.personal[i].packed["w"].tolist() for i in (0, 1)] == [[0b10010000], [0b01110000]]
    assert [result.personal[i].scale for i in (0, 1)] == [2.0, 2.0]


def test_the_shared_model_is_fedavg():
    vectors = [drawn(i) for i in range(3)]
    close(merge_vectors("tall_masks", vectors, [1, 2, 5])[0], merge_vectors("fedavg", vectors, [1, 2, 5])[0])


def test_clients_that_moved_other_parameters_get_back_what_they_sent():
    supports = np.random.default_rng(0).integers(0, 3, size=(6, 4))
    vectors = [{"w": drawn(i, {"w": (6, 4)})["w"] * (supports == i)} for i in range(3)]
    zero = {"w": np.zeros((6, 4))}
    _, result = merge_vectors("tall_masks", vectors, [1, 7, 3], base=zero)
    for found, wanted in zip(own_vectors(result, zero), vectors, strict=True):
        close(found, wanted, 1e-12)


def test_one_client_gets_its_own_model():
    close(own_vectors(merge_vectors("tall_masks", [drawn(0)])[1], base_of())[0], drawn(0))


def test_a_threshold_of_nothing_keeps_what_a_client_moved():
    vectors = [{"w": np.array([1.0, 0.0])}, {"w": np.array([5.0, 5.0])}]
    _, result = merge_vectors("tall_masks(threshold=0)", vectors)
    assert result.personal[0].packed["w"].tolist() == [0b10000000]


def test_clients_that_did_not_move_keep_nothing():
    _, result = merge_vectors("tall_masks", [{"w": np.zeros(3)}] * 2)
    assert all(part.packed["w"].tolist() == [0] for part in result.personal.values())


def test_a_threshold_out_of_range_is_refused():
    with pytest.raises(InvalidOption, match="threshold must lie in"):
        build_pipeline("tall_masks(threshold=-1)")
