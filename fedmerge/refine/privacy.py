"""What is done so that clients' answers about a merged model tell little of them, and what it costs in epsilon."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from numbers import Integral, Real

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.errors import InvalidOption
from fedmerge.layout import BatchNormPolicy
from fedmerge.questions import Ask
from fedmerge.refine.masks import least_clients, masked
from fedmerge.refine.refinement import Refinement
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
    exact_metrics
        Whether clients tell their training loss, and what they find when they judge the model, all the same: exact, and
        each client's own. Otherwise they keep them to themselves where there are masks or noise.

    Raises
    ------
    InvalidOption
        Noise shared among clients whose answers are seen one by one.
    """

    masks: bool = False
    noise: NoisySums | None = None
    exact_metrics: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.noise is not None and self.noise.sharers > 1 and not self.masks:
            raise InvalidOption(
                "NoisySums: sharers above 1 leave each client's answer too little noise: add masks=True"
            )

    @cached_property
    def active(self) -> bool:
        """Whether anything is protected."""
        return self.masks or self.noise is not None

    @cached_property
    def withholds_metrics(self) -> bool:
        """Whether clients keep training losses and evaluations to themselves."""
        return self.active and not self.exact_metrics

    def limits(self, asked: bool, judged: bool) -> list[str]:
        """What whoever relies on it should know before a run.

        Parameters
        ----------
        asked
            Whether the method asks clients about the merged model.
        judged
            Whether clients were to judge the model after each round.

        Examples
        --------
        >>> Privacy(masks=True, exact_metrics=True).limits(asked=True, judged=True)
        ['masks are simulated: this server makes them, of answers that reach it in the clear']
        """
        told = {
            "masks are simulated: this server makes them, of answers that reach it in the clear": self.masks,
            "the method asks clients for nothing beyond their models, which neither masks nor noise protect": not asked,
            "clients keep training losses to themselves, and are not asked to judge the model, for what they find "
            "would be exact; Privacy(exact_metrics=True) has them tell it": judged and not self.exact_metrics,
        }
        return [words for words, holds in told.items() if holds and self.active]

    def check(
        self, aggregator: Aggregator, refinements: Sequence[Refinement], batch_norm: BatchNormPolicy = "mean"
    ) -> None:
        """Make sure that the stages of a merge can be protected so.

        Raises
        ------
        InvalidOption
            Clients would send statistics of their own models or of batch norms, or such as noise cannot protect.
        """
        if not self.active:
            return
        if batch_norm == "recalibrate":
            raise InvalidOption(
                'batch_norm = "recalibrate" has every client send exact means and variances of its examples, which '
                'neither masks nor noise cover: take batch_norm = "mean" or "local", or, under masks alone, the '
                "refinement recalibrate, as in fedavg+recalibrate"
            )
        if aggregator.needs:
            names = ", ".join(statistic.name for statistic in aggregator.needs)
            raise InvalidOption(
                f"{type(aggregator).__name__} looks at every client's own {names}, which neither masks nor noise "
                "cover: merge by fedavg and refine that, as in fedavg+logistic_head+natural_gradient"
            )
        if self.noise is not None:
            for kind in (kind for one in refinements for kind in one.needs):
                self.noise.applied(kind)

    def check_clients(self, number: int) -> None:
        """Make sure that so many clients are enough to hide each one's answer, before any of them trains.

        Raises
        ------
        InvalidOption
            They are not.
        """
        least = least_clients([self.noise]) if self.masks else 1
        if number < least:
            raise InvalidOption(
                f"privacy: {number} clients take part, and {least} are needed to hide each one's answer: ask more "
                "clients, or share the noise among fewer (sharers)"
            )

    def protected(self, ask: Ask, round: int = 0) -> Ask:
        """The same clients, under masks where there are any."""
        return masked(ask, round) if self.masks else ask


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
        A value out of range, or Opacus is missing.
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
        raise InvalidOption("epsilon is reckoned by Opacus: pip install 'fedmerge[privacy]'") from error

    def best(orders: Sequence[float]) -> tuple[float, float]:
        spent = rdp.compute_rdp(q=1.0, noise_multiplier=noise_multiplier, steps=int(answers), orders=orders)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an order at the end of the list is best: still a bound
            found, order = rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)
        return float(found), float(order)

    found, order = best(usual)
    if order in (min(usual), max(usual)):
        found = min(found, best(_FURTHER)[0])
    # An epsilon below 0 keeps 0 as well.
    return max(0.0, found)


def _check_positive(noise_multiplier: float) -> None:
    value = noise_multiplier
    if isinstance(value, bool) or not isinstance(value, Real) or not (isfinite(value) and value > 0):
        raise InvalidOption(f"epsilon wants a positive noise multiplier, got {value!r}")


_FURTHER = [1 + 1.1**-x for x in range(25, 120)] + [64 * 1.1**x for x in range(120)]
"""Orders near 1 for little noise, and large ones for much."""
