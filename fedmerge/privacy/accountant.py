"""What noisy answers have cost together, in epsilon, by the accountant of Opacus."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from math import isfinite
from numbers import Integral, Real

from fedmerge.errors import InvalidOption, MissingExtra

__all__ = ["epsilon"]


def epsilon(noise_multiplier: float, answers: int, delta: float) -> float:
    """What so many noisy answers have cost together: (epsilon, delta)-differential privacy.

    An upper bound, by Rényi accounting of Gaussian mechanisms (Mironov 2017; Balle et al. 2020, theorem 21) with
    Opacus, which ``pip install 'fedmerge[privacy]'`` brings: what its ``RDPAccountant`` says. Where the best of the
    accountant's orders is the least or the greatest that it tries, further orders are tried as well. The clients'
    models themselves are not counted.

    Parameters
    ----------
    noise_multiplier
        Of :class:`~fedmerge.statistics.NoisySums`.
    answers
        Questions that clients have been asked: ``MergeResult.answers`` of one merge. Over rounds they add up.
    delta
        Between 0 and 1, well below one over the number of examples.

    Raises
    ------
    InvalidOption
        A value out of range.
    MissingExtra
        Opacus is missing.
    """
    _check_positive(noise_multiplier)
    if isinstance(answers, bool) or not isinstance(answers, Integral) or answers < 0:
        raise InvalidOption(f"epsilon wants a whole number of answers, at least 0, got {answers!r}")
    if isinstance(delta, bool) or not isinstance(delta, Real) or not 0 < delta < 1:
        raise InvalidOption(f"epsilon wants a delta above 0 and below 1, got {delta!r}")
    if not answers:
        return 0.0
    try:
        rdp = importlib.import_module("opacus.accountants.analysis.rdp")
        usual = importlib.import_module("opacus.accountants").RDPAccountant.DEFAULT_ALPHAS
    except ImportError as error:
        raise MissingExtra("epsilon, which Opacus reckons,", "privacy", str(error)) from error

    def best(orders: Sequence[float]) -> tuple[float, float]:
        spent = rdp.compute_rdp(q=1.0, noise_multiplier=noise_multiplier, steps=int(answers), orders=orders)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an order at the end of the list is best: still a bound
            best_epsilon, order = rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)
        return float(best_epsilon), float(order)

    best_epsilon, order = best(usual)
    if order in (min(usual), max(usual)):
        best_epsilon = min(best_epsilon, best(_FURTHER)[0])
    # An epsilon below 0 keeps 0 as well.
    return max(0.0, best_epsilon)


def _check_positive(noise_multiplier: float) -> None:
    value = noise_multiplier
    if isinstance(value, bool) or not isinstance(value, Real) or not (isfinite(value) and value > 0):
        raise InvalidOption(f"epsilon wants a positive noise multiplier, got {value!r}")


_FURTHER = [1 + 1.1**-x for x in range(25, 120)] + [64 * 1.1**x for x in range(120)]
"""Orders near 1 for little noise, and large ones for much."""
