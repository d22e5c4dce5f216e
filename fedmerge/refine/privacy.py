"""What is done so that clients' answers about a merged model tell little of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.errors import InvalidOption
from fedmerge.layout import BatchNormPolicy
from fedmerge.questions import Ask
from fedmerge.refine.refinement import Refinement
from fedmerge.statistics import NoisySums

__all__ = ["Privacy"]


@dataclass(frozen=True)
class Privacy:
    """How clients' answers are protected; their models, which are sent before, are not.

    Parameters
    ----------
    masks
        Secure aggregation is simulated, without cryptography: what is merged is as if the server saw sums over clients
        only, see :func:`~fedmerge.privacy.simulated_masks.masked`.
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
        limits_told = {
            "masks are simulated: this server makes them, of answers that reach it in the clear": self.masks,
            "the method asks clients for nothing beyond their models, which neither masks nor noise protect": not asked,
            "clients keep training losses to themselves, and are not asked to judge the model, for what they find "
            "would be exact; Privacy(exact_metrics=True) has them tell it": judged and not self.exact_metrics,
        }
        return [words for words, holds in limits_told.items() if holds and self.active]

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
            for kind in (kind for refinement in refinements for kind in refinement.needs):
                self.noise.applied(kind)

    def check_clients(self, number: int) -> None:
        """Make sure that so many clients are enough to hide each one's answer, before any of them trains.

        Raises
        ------
        InvalidOption
            They are not.
        """
        if not self.masks:
            return
        from fedmerge.privacy.simulated_masks import least_clients  # noqa: PLC0415 - only for who asks for it

        least = least_clients([self.noise])
        if number < least:
            raise InvalidOption(
                f"privacy: {number} clients take part, and {least} are needed to hide each one's answer: ask more "
                "clients, or share the noise among fewer (sharers)"
            )

    def protected(self, ask: Ask, round: int = 0) -> Ask:
        """The same clients, under simulated masks where there are any."""
        if not self.masks:
            return ask
        from fedmerge.privacy.simulated_masks import masked  # noqa: PLC0415 - only for who asks for it

        return masked(ask, round)
