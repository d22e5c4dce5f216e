"""What answers with noise cost: as the accountant says, and no less than the exact cost."""

from __future__ import annotations

from math import exp, log, sqrt

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedmerge.errors import InvalidOption
from fedmerge.refine import epsilon

DELTA = 1e-5
SETTINGS = [(0.7, 1), (1.0, 1), (1.0, 6), (2.0, 2), (2.0, 3), (4.0, 2), (4.0, 40), (8.0, 100), (12.0, 7), (3.0, 1000)]


@pytest.mark.parametrize(("sigma", "answers"), SETTINGS)
def test_epsilon_is_the_accountants(sigma, answers):
    accountants = pytest.importorskip("opacus.accountants")
    accountant = accountants.RDPAccountant()
    for _ in range(answers):
        accountant.step(noise_multiplier=sigma, sample_rate=1.0)
    assert epsilon(sigma, answers, DELTA) == pytest.approx(accountant.get_epsilon(delta=DELTA), rel=1e-9)


def exact(sigma: float, answers: int, delta: float = DELTA) -> float:
    """What Gaussian mechanisms cost together, exactly: one with ``sigma / sqrt(answers)`` (Balle and Wang 2018)."""
    mu = sqrt(answers) / sigma

    def excess(e):
        return norm.cdf(mu / 2 - e / mu) - exp(e + norm.logcdf(-mu / 2 - e / mu)) - delta

    return 0.0 if excess(0.0) <= 0 else brentq(excess, 0.0, mu * mu / 2 + mu * sqrt(2 * log(1 / delta)) + 1)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5, 1.0, 5.0, 50.0, 1e3, 1e4, 1e5, 1e6, 1e9])
@pytest.mark.parametrize("answers", [1, 3, 500])
def test_epsilon_is_never_negative_and_no_less_than_the_cost(sigma, answers):
    pytest.importorskip("opacus")
    found, cost = epsilon(sigma, answers, DELTA), exact(sigma, answers)
    assert found >= 0.0
    assert cost * (1 - 1e-9) <= found <= 1.35 * cost + 2e-4
    assert epsilon(sigma * 1.5, answers, DELTA) <= found


@pytest.mark.parametrize("delta", [1e-300, 1e-12, 1e-3, 0.1, 0.9])
@pytest.mark.parametrize("sigma", [0.1, 2.0, 1e3, 1e7])
def test_epsilon_is_no_less_than_the_cost_at_any_delta(sigma, delta):
    pytest.importorskip("opacus")
    assert epsilon(sigma, 3, delta) >= max(0.0, exact(sigma, 3, delta) * (1 - 1e-9))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((float("nan"), 1, DELTA), "noise multiplier"),
        ((float("inf"), 1, DELTA), "noise multiplier"),
        (("2", 1, DELTA), "noise multiplier"),
        ((True, 1, DELTA), "noise multiplier"),
        ((1.0, -1, DELTA), "whole number of answers"),
        ((1.0, 1.5, DELTA), "whole number of answers"),
        ((1.0, True, DELTA), "whole number of answers"),
        ((1.0, 1, 0.0), "delta"),
        ((1.0, 1, 1.0), "delta"),
        ((1.0, 1, float("nan")), "delta"),
        ((1.0, 1, None), "delta"),
        ((1.0, 0, 2.0), "delta"),
    ],
)
def test_an_epsilon_of_nonsense_is_an_error(given, words):
    with pytest.raises(InvalidOption, match=f"epsilon wants .*{words}"):
        epsilon(*given)


def test_epsilon_takes_whole_numbers_of_any_kind():
    pytest.importorskip("opacus")
    assert epsilon(2.0, np.int64(2), DELTA) == epsilon(2, 2, np.float64(DELTA)) > 0
