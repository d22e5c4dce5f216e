"""The quasi-Newton steps of a head, against dense linear algebra, and when the next one is taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmerge.refine import LogisticHead

STATE = {"out.weight": torch.zeros(3, 2, dtype=torch.float64)}
RNG = np.random.default_rng(0)
MOMENTS = np.array([[2.0, 0.5], [0.5, 1.0]])
OUTER = np.array([[0.3, -0.1, -0.1], [-0.1, 0.4, -0.2], [-0.1, -0.2, 0.5]])


def step(damping):
    """A step after the first."""
    return LogisticHead(damping=damping, exchanges=3).steps(STATE)[1]


def proposed(damping, gradient, memory, state=STATE):
    sums = {
        "head_gradient": {"out.weight.gradient": torch.from_numpy(gradient), "out.weight.G": torch.from_numpy(OUTER)}
    }
    found, memory = step(damping).propose(state, sums, {"moments": torch.from_numpy(MOMENTS), **memory})
    return found.directions[0]["out.weight"].numpy(), memory


def inverses(damping):
    """Of both factors, damped in units of the mean of each one's diagonal."""
    return [np.linalg.inv(f + damping * np.diag(f).mean() * np.eye(len(f))) for f in (OUTER, MOMENTS)]


@pytest.mark.parametrize("damping", [0.1, 2.0])
def test_the_first_direction_is_preconditioned_by_both_damped_factors(damping):
    gradient, (outer, inner) = RNG.normal(size=(3, 2)), inverses(damping)
    direction, _ = proposed(damping, gradient, {})
    np.testing.assert_allclose(direction, -outer @ gradient @ inner)


def test_later_directions_are_those_of_bfgs_from_a_scaled_start():
    """``H <- (1 - s y^T / y^T s) H (1 - y s^T / y^T s) + s s^T / y^T s``, from ``H = s^T y / y^T P y P``."""
    outer, inner = inverses(0.5)
    curvature = np.kron(OUTER + 0.2 * np.eye(3), MOMENTS)
    heads, gradients, memory = [], [], {}
    for head in RNG.normal(size=(3, 6)):  # by rows
        heads.append(head)
        gradients.append(curvature @ head + 0.3 * np.sin(head))
        state = {"out.weight": torch.from_numpy(head.reshape(3, 2))}
        direction, memory = proposed(0.5, gradients[-1].reshape(3, 2), memory, state)
    pairs = [(heads[i + 1] - heads[i], gradients[i + 1] - gradients[i]) for i in range(2)]
    assert all(s @ y > 0 for s, y in pairs)
    start = np.kron(outer, inner)
    s, y = pairs[-1]
    h = start * (s @ y) / (y @ start @ y)
    for s, y in pairs:
        left = np.eye(6) - np.outer(s, y) / (y @ s)
        h = left @ h @ left.T + np.outer(s, s) / (y @ s)
    np.testing.assert_allclose(direction.ravel(), -h @ gradients[-1], rtol=1e-9)


def test_a_step_that_gained_next_to_nothing_is_the_last():
    memory = {"moments": torch.from_numpy(MOMENTS)}
    assert step(0.1).wanted(torch.tensor([1.0, 0.99]), memory)
    assert not step(0.1).wanted(torch.tensor([1.0, 1.0 - 1e-5]), memory)
    assert step(0.1).wanted(torch.zeros(0), memory)
    assert not step(0.1).wanted(torch.tensor([1.0, 0.5]), {})
