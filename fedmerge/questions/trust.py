"""How far a server believes what single clients answer."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from typing import Literal, get_args

from fedmerge.errors import InvalidOption

__all__ = ["Judgement", "Sums", "Trust"]

Judgement = Literal["mean", "guarded", "trimmed", "median"]
Sums = Literal["mean", "clipped"]


@dataclass(frozen=True)
class Trust:
    """How far single clients are believed where they answer questions about a merged model.

    Whatever is set here, an answer that cannot be one is refused, as are sums that break an identity which all others'
    keep but those of as many as may lie (:mod:`fedmerge.statistics.laws`), and nobody counts for more examples than it
    told in training.
    What is left is a lie in the right form, against which there is only what the other clients say. Under masks no
    single answer can be seen, and nothing here has an effect.

    Parameters
    ----------
    judgement
        How clients choose among models: by how their mean losses change from the first to the others, weighted by their
        examples. ``"mean"`` believes every number. ``"guarded"`` is the mean too, unless its choice is more than a
        twentieth worse than another one once no client's change counts for more than the largest that is left without
        those of the `liars`: then it is that other one. ``"trimmed"`` leaves the `liars` at either end out (Yin et al.
        2018), ``"median"`` takes the weighted median: take one of these where clients are not trusted. Both leave out
        honest clients too whose data are like nobody else's.
    sums
        How sums are added up. ``"mean"`` believes every number. ``"clipped"`` gives a client less weight where a tensor
        of its is more than four times as large, by its norm, as the largest without those of the `liars`: as if it were
        as large as that.
    liars
        Share of the clients that may lie, from 0 to below 0.5. Of fewer than five clients 0.2 is nobody, and
        ``"guarded"`` judgements are means; all else reckons with one of three, unless this is 0.
    lowest_loss
        Least mean loss that there can be, 0 where not given: set it for losses of your own that may be negative.

    Raises
    ------
    InvalidOption
        A value out of range.

    Examples
    --------
    >>> Trust().suspects(6), Trust().suspects(4), Trust().suspects(4, least=1), Trust(liars=0).suspects(10, least=1)
    (1, 0, 1, 0)
    """

    judgement: Judgement = "guarded"
    sums: Sums = "clipped"
    liars: float = 0.2
    lowest_loss: float | None = None

    def __post_init__(self) -> None:
        if self.judgement not in get_args(Judgement):
            raise InvalidOption(f"Trust: judgement must be of {get_args(Judgement)}, got {self.judgement!r}")
        if self.sums not in get_args(Sums):
            raise InvalidOption(f"Trust: sums must be of {get_args(Sums)}, got {self.sums!r}")
        if isinstance(self.liars, bool) or not isinstance(self.liars, int | float) or not 0 <= self.liars < 0.5:
            raise InvalidOption(f"Trust: liars must be a share of the clients below 0.5, got {self.liars!r}")
        lowest = self.lowest_loss
        if lowest is not None and (isinstance(lowest, bool) or not isinstance(lowest, int | float) or isnan(lowest)):
            raise InvalidOption(f"Trust: lowest_loss must be a number, got {lowest!r}")

    def suspects(self, clients: int, least: int = 0) -> int:
        """How many of so many clients may lie, always a minority: `least` of them, unless nobody does."""
        if not self.liars:
            return 0
        return min(max(least, int(self.liars * clients + 1e-9)), max(0, clients - 1) // 2)
