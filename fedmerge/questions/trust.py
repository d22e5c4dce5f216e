"""How far a server believes what single clients answer: means over clients in which no few of them decide alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal, get_args

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.state import State

__all__ = ["Judgement", "Sums", "Trust", "evened", "judged_losses", "shares"]

Judgement = Literal["mean", "guarded", "trimmed", "median"]
Sums = Literal["mean", "clipped"]


@dataclass(frozen=True)
class Trust:
    """How far single clients are believed where they answer questions about a merged model.

    Whatever is set here, an answer that cannot be one is refused, as are sums that break an identity which all others'
    keep but those of as many as may lie (:mod:`fedmerge.statistics.sending.laws`), and nobody counts for more examples
    than it told in training.
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


_FAR = 4.0
"""Sums of honest clients with unlike data are seldom further apart: most of them are left as they are."""
_MORE = 1.2
_TURNS = 8
_CONTESTED = 0.05
"""Where the choice of the mean is so much worse than another for the others, it is not theirs."""


def judged_losses(losses: Tensor, weights: Tensor, judgement: Judgement, suspects: int) -> Tensor:
    """Mean losses of models, [points], where no `suspects` of the clients decide alone which is least.

    Parameters
    ----------
    losses
        [clients, points], each client's mean losses, float64. The others are compared to the first point.
    weights
        [clients], how many examples judged, above 0.
    judgement
        See :class:`~fedmerge.questions.Trust`.
    suspects
        How many clients may lie, a minority.

    Examples
    --------
    >>> losses = torch.tensor([[1.0, 4.0], [1.0, 4.0], [1e9, 0.0]])
    >>> judged_losses(losses, torch.ones(3), "guarded", 1).round(decimals=2)
    tensor([1.0000, 2.6700])
    """
    weights = weights[:, None].to(losses)
    plain = (losses * weights).sum(0) / weights.sum()
    if judgement == "mean":
        return plain
    # Compared to a bad model all good ones are far better, and a lie among them is as large as that: so they are
    # compared to the best known, until that stays the best.
    best = int(plain.argmin()) if judgement == "guarded" else 0
    for _ in range(_TURNS):
        found = _compared(losses, best, weights, judgement, suspects)
        if int(found.argmin()) == best:
            break
        best = int(found.argmin())
    return plain if judgement == "guarded" and not _contested(plain, found) else found


def _compared(losses: Tensor, to: int, weights: Tensor, judgement: Judgement, suspects: int) -> Tensor:
    """Mean losses, [points], as clients' losses at one of the points and their changes from there to the others.

    Clients that lose much everywhere are no reason to leave out what they say of one model against another.
    """
    start = losses[:, to : to + 1]
    changes = losses - start
    if judgement == "guarded":
        heard = _clipped(start, suspects) + _clipped(changes, suspects)
        floor = losses.amin().clamp(max=0)  # only losses of one's own are ever below 0
        return (heard.clamp_min(floor) * weights).sum(0) / weights.sum()
    choose = {"trimmed": _trimmed, "median": _median}[judgement]
    return choose(start, weights, suspects) + choose(changes, weights, suspects)


def _contested(plain: Tensor, bounded: Tensor) -> bool:
    """Whether the mean's choice, or its losses, are those of single clients that count for far more than the others."""
    loud = bool((plain[0] - bounded[0]).abs() > bounded[0].abs())
    return loud or bool(bounded[plain.argmin()] - bounded.min() > _CONTESTED * bounded.min().abs())


def _clipped(values: Tensor, suspects: int) -> Tensor:
    """No number larger than the largest in its column that is left without those of the suspects."""
    most = values.abs().topk(suspects + 1, dim=0).values[-1]
    return values.clamp(-most, most)


def _trimmed(values: Tensor, weights: Tensor, cut: int) -> Tensor:
    ordered, order = values.sort(0)
    kept = slice(cut, len(values) - cut)
    shares = weights.expand_as(values).gather(0, order)[kept]
    return (ordered[kept] * shares).sum(0) / shares.sum(0)


def _median(values: Tensor, weights: Tensor, _cut: int) -> Tensor:
    ordered, order = values.sort(0)
    below = weights.expand_as(values).gather(0, order).cumsum(0) / weights.sum()
    last = torch.full_like(below[:1], len(values) - 1, dtype=torch.long)
    ends = [torch.minimum((below < 0.5 + slack).sum(0, keepdim=True), last) for slack in (-1e-9, 1e-9)]
    return sum((ordered.gather(0, end)[0] for end in ends), torch.zeros_like(ordered[0])) / 2


def shares(values: Sequence[State], suspects: int, parameters: Collection[str] = ()) -> list[float]:
    """What each client's sums of one statistic count for, from 0 to 1: less where a tensor stands far from the others'.

    A tensor may have four times the norm of the largest without those of the suspects, or else it counts as that one.
    All of a client's tensors count for as little as the one that is furthest off, for they go together: moments of
    which one is shrunk are no moments.

    Parameters
    ----------
    values
        Each client's means, with the same names.
    suspects
        How many clients may lie, a minority.
    parameters
        Names of the model's: those of one layer, its weight and its bias, count as one tensor.

    Examples
    --------
    >>> shares([{"w": torch.ones(1)}, {"w": -torch.ones(1)}, {"w": torch.full((1,), 1e6)}], 1)
    [1.0, 1.0, 1e-06]
    """
    groups: dict[str, list[str]] = {}
    for name in values[0]:
        groups.setdefault(name.rpartition(".")[0] if name in parameters else name, []).append(name)
    found = [1.0] * len(values)
    for names in groups.values():
        norms = [math.hypot(*(float(value[name].double().norm()) for name in names)) for value in values]
        most = sorted(norms)[-1 - suspects]
        found = [min(s, most / norm) if norm > _FAR * most else s for s, norm in zip(found, norms, strict=True)]
    return found


def evened(label_weights: Sequence[float], suspects: int) -> list[float]:
    """What each client's sums count for, from 0 to 1, where a label may count for no more than 1.

    Classes may be weighted, which nobody but the clients need know: then a label counts for no more than the largest of
    the label weights that is left without those of the suspects.

    Examples
    --------
    >>> evened([1.0, 1.0, 4.0], 1), evened([2.0, 3.0, 4.0], 1)
    ([1.0, 1.0, 0.25], [1.0, 1.0, 0.75])
    """
    most = max(1.0, sorted(label_weights)[-1 - suspects])
    return [most / weight if weight > _MORE * most else 1.0 for weight in label_weights]
