"""WUDI beside NumPy, and its laws."""

import numpy as np
import pytest

from fedmerge.errors import InvalidOption
from fedmerge.merging import build_pipeline
from tests.aggregators.task_vector_cases import close, drawn, merge_vectors


def system(matrices, shares):
    """``total`` and ``target`` with which the sum of disturbances is least where ``tau total = target``."""
    factors = [len(matrices) * p / np.sum(m**2) for p, m in zip(shares, matrices, strict=True)]
    total = sum(f * m.T @ m for f, m in zip(factors, matrices, strict=True))
    return total, sum(f * m @ m.T @ m for f, m in zip(factors, matrices, strict=True))


def exact(matrices, shares, ridge):
    total, target = system(matrices, shares)
    hold = ridge * np.trace(total) / len(total)
    mean = sum(p * m for p, m in zip(shares, matrices, strict=True))
    return (target + hold * mean) @ np.linalg.inv(total + hold * np.eye(len(total)))


def adam(matrices, shares, steps, rate):
    total, target = system(matrices, shares)
    tau = len(matrices) * sum(p * m for p, m in zip(shares, matrices, strict=True))
    first, second = np.zeros_like(tau), np.zeros_like(tau)
    for t in range(1, steps + 1):
        slope = 2 * (tau @ total - target)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        tau = tau - rate * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    return tau


def expected(vectors, shares, solve, *settings):
    wanted = {}
    for name, first in vectors[0].items():
        if first.ndim >= 2:
            matrices = [v[name].reshape(len(first), -1) for v in vectors]
            wanted[name] = solve(matrices, shares, *settings).reshape(first.shape)
        else:
            wanted[name] = sum(p * v[name] for p, v in zip(shares, vectors, strict=True))
    return wanted


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 3.0])
def test_the_minimum_as_numpy_has_it(ridge):
    vectors = [drawn(i) for i in range(3)]
    close(merge_vectors(f"wudi(ridge={ridge})", vectors)[0], expected(vectors, (1 / 3,) * 3, exact, ridge), 1e-7)
    weighted = merge_vectors(f"wudi(ridge={ridge})", vectors, [1, 2, 5])[0]
    close(weighted, expected(vectors, (1 / 8, 2 / 8, 5 / 8), exact, ridge), 1e-7)


@pytest.mark.parametrize(("steps", "rate"), [(0, 1e-5), (7, 1e-5), (7, 1e-2)])
def test_adams_steps_as_numpy_has_them(steps, rate):
    vectors = [drawn(i) for i in range(3)]
    method = f"wudi(solver=adam,steps={steps},learning_rate={rate})"
    close(
        merge_vectors(method, vectors, [1, 2, 5])[0], expected(vectors, (1 / 8, 2 / 8, 5 / 8), adam, steps, rate), 1e-7
    )


def test_no_other_update_disturbs_the_clients_less():
    matrices = [drawn(i, {"w": (5, 4)})["w"] for i in range(3)]

    def disturbance(tau):
        return sum(np.sum(((tau - m) @ m.T) ** 2) / np.sum(m**2) for m in matrices)

    tau = merge_vectors("wudi(ridge=1e-9)", [{"w": m} for m in matrices])[0]["w"]
    generator = np.random.default_rng(5)
    for _ in range(20):
        assert disturbance(tau) < disturbance(tau + 0.01 * generator.normal(size=tau.shape))


def test_updates_on_other_inputs_are_added():
    right = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    vectors = [{"w": drawn(i, {"w": (5, 2)})["w"] @ right[:, 2 * i : 2 * i + 2].T} for i in range(3)]
    close(merge_vectors("wudi(ridge=1e-9)", vectors)[0], {"w": sum(v["w"] for v in vectors)}, 1e-6)


@pytest.mark.parametrize("count", [1, 4])
def test_equal_updates_give_that_update(count):
    close(merge_vectors("wudi", [drawn(0)] * count)[0], drawn(0))


def test_it_scales_with_the_updates():
    vectors = [drawn(i) for i in range(3)]
    small, _ = merge_vectors("wudi", [{n: 1e-4 * t for n, t in v.items()} for v in vectors])
    close({n: 1e4 * t for n, t in small.items()}, merge_vectors("wudi", vectors)[0], 1e-7)


def test_clients_that_did_not_move_say_nothing_of_inputs():
    still = {name: 0 * value for name, value in drawn(0).items()}
    merged, _ = merge_vectors("wudi", [still] * 2)
    assert all((value == 0).all() for value in merged.values())
    merged, _ = merge_vectors("wudi(ridge=1e-9)", [drawn(0), still])
    np.testing.assert_allclose(merged["layer.weight"], drawn(0)["layer.weight"], atol=1e-6)


@pytest.mark.parametrize(
    ("option", "value"), [("ridge", 0.0), ("steps", -1), ("learning_rate", 0.0), ("solver", "newton")]
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(InvalidOption, match=option):
        build_pipeline("wudi", {"wudi": {option: value}})
