"""What is done so that clients' answers about a merged model tell little of them, and what it costs in epsilon."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from fedmerge.aggregators.base import Aggregator
from fedmerge.errors import InvalidOption
from fedmerge.questions import Ask
from fedmerge.refine.base import Refinement
from fedmerge.refine.masks import masked
from fedmerge.statistics import NoisySums

__all__ = ["Privacy", "epsilon"]


@dataclass(frozen=True)
class Privacy:
    """How clients' answers are protected; their models, which are sent before, are not.

    Parameters
    ----------
    masks
        The server sees sums over clients only, see :func:`~fedmerge.refine.masks.masked`.
    noise
        What an example changes is bounded, and hidden in noise; None for none.

    Raises
    ------
    InvalidOption
        Noise shared among clients whose answers are seen one by one.
    """

    masks: bool = False
    noise: NoisySums | None = None

    def __post_init__(self) -> None:
        if self.noise is not None and self.noise.sharers > 1 and not self.masks:
            raise InvalidOption(
                "NoisySums: sharers above 1 leave each client's answer too little noise: add masks=True"
            )

    def check(self, aggregator: Aggregator, refinements: Sequence[Refinement]) -> None:
        """Make sure that the stages of a merge can be protected so.

        Raises
        ------
        InvalidOption
            Clients would send statistics of their own models, or such as noise cannot protect.
        """
        if not self.masks and self.noise is None:
            return
        if aggregator.needs:
            names = ", ".join(statistic.name for statistic in aggregator.needs)
            raise InvalidOption(
                f"{type(aggregator).__name__} looks at every client's own {names}, which neither masks nor noise "
                "cover: merge by fedavg and refine that, as in fedavg+logistic_head+natural_gradient"
            )
        if self.noise is not None:
            for kind in (kind for one in refinements for kind in one.needs):
                self.noise.applied(kind)

    def protected(self, ask: Ask, seed: int) -> Ask:
        """The same clients, under masks where there are any."""
        return masked(ask, seed) if self.masks else ask


def epsilon(noise_multiplier: float, answers: int, delta: float) -> float:
    """What so many noisy answers have cost together: (epsilon, delta)-differential privacy.

    An upper bound, by Rényi accounting of Gaussian mechanisms (Mironov 2017) with Opacus, which
    ``pip install 'fedmerge[privacy]'`` brings. The clients' models themselves are not counted.

    Parameters
    ----------
    noise_multiplier
        Of :class:`~fedmerge.statistics.NoisySums`.
    answers
        Questions that each client answered, ``MergeResult.answers``.
    delta
        Between 0 and 1, well below one over the number of examples.

    Raises
    ------
    InvalidOption
        A value out of range, or Opacus is missing.
    """
    if not noise_multiplier > 0 or answers < 0 or not 0 < delta < 1:
        raise InvalidOption(
            "epsilon wants a positive noise multiplier, a number of answers and a delta between 0 and 1, "
            f"got {noise_multiplier!r}, {answers!r}, {delta!r}"
        )
    if not answers:
        return 0.0
    try:
        rdp = importlib.import_module("opacus.accountants.analysis.rdp")
    except ImportError as error:
        raise InvalidOption("epsilon is reckoned by Opacus: pip install 'fedmerge[privacy]'") from error
    spent = rdp.compute_rdp(q=1.0, noise_multiplier=noise_multiplier, steps=answers, orders=_ORDERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an order at the end of the list is best: still a bound
        return float(rdp.get_privacy_spent(orders=_ORDERS, rdp=spent, delta=delta)[0])


_ORDERS = [1 + x / 20 for x in range(1, 400)] + [float(x) for x in range(21, 128)] + [2.0**x for x in range(7, 16)]
