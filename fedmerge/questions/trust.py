"""How far a server believes single clients that answer questions about a merged model.

An answer that is impossible is refused elsewhere (:func:`~fedmerge.questions.question.checked`). Here stand the means
over clients that a few clients with possible, but wrong answers cannot decide alone.
"""

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

    Some answers are refused under every setting: those that are impossible, those whose sums break an identity that
    all other clients' sums keep (:mod:`fedmerge.statistics.sending.laws`), and those for more examples than the client
    named in training. What is left are wrong answers in the right form. They can only be told by comparison with the
    other clients' answers. Under masks the server sees no single answer, and nothing here has an effect.

    Parameters
    ----------
    judgement
        How the best of several models is chosen from the clients' losses. All but ``"mean"`` go by how each client's
        loss changes from one model to another, weighted by its examples.

        - ``"mean"``: by the mean loss; every number is believed.
        - ``"guarded"``: by the mean loss too, but the mean is checked: no client's change may count for more than the
          largest change that is left without those of the `liars`. If this makes another model better by more than a
          twentieth, that model is chosen.
        - ``"trimmed"``: the `liars` at either end are left out (Yin et al. 2018).
        - ``"median"``: by the weighted median.

        Take one of the last two where clients are not trusted. They also leave out honest clients whose data are unlike
        all others'.
    sums
        How statistics are added up. ``"mean"`` believes every number. ``"clipped"`` bounds each client's tensors: where
        the norm of one is more than four times the largest norm that is left without those of the `liars`, the client
        gets less weight, as if its tensor were as large as that one.
    liars
        The share of clients that may lie, from 0 to below 0.5. With fewer than five clients the default of 0.2 makes
        nobody, and then ``"guarded"`` is the mean. All other settings reckon with at least one
        liar among three or more clients, unless this is 0.
    lowest_loss
        The least mean loss that is possible, 0 where not given. Set it for a loss of your own that may be negative.

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
        """How many of so many clients may lie: always a minority, and at least `least` unless `liars` is 0."""
        if not self.liars:
            return 0
        return min(max(least, int(self.liars * clients + 1e-9)), max(0, clients - 1) // 2)


_FAR = 4.0
"""How many times the usual norm a client's tensor may have. Honest clients with unlike data seldom differ by more, so
that they keep their full weight."""
_HEAVIER = 1.2
"""How many times the usual weight a client's labels may have: room for what compression rounds."""
_TURNS = 8
"""How often the point of comparison may change: two models may take turns as the best."""
_CONTESTED = 0.05
"""If the mean's choice is worse than another by this share once loud clients are bounded, the other is chosen."""


def judged_losses(losses: Tensor, weights: Tensor, judgement: Judgement, suspects: int) -> Tensor:
    """Mean losses of models, [points], in which `suspects` clients cannot decide alone which model is best.

    Parameters
    ----------
    losses
        Each client's mean losses, [clients, points], float64. The first point is the model as it is now.
    weights
        How many examples judged, [clients], above 0.
    judgement
        See :class:`Trust`.
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
    # Changes of the loss are only bounded well where they are small. From a bad model to any good one they are large,
    # and a lie of that size would pass. So models are compared with the best one so far, until it stays the best.
    best = int(plain.argmin()) if judgement == "guarded" else 0
    for _ in range(_TURNS):
        robust = _compared(losses, best, weights, judgement, suspects)
        if int(robust.argmin()) == best:
            break
        best = int(robust.argmin())
    return plain if judgement == "guarded" and not _contested(plain, robust) else robust


def _compared(losses: Tensor, start: int, weights: Tensor, judgement: Judgement, suspects: int) -> Tensor:
    """Robust mean losses, [points]: of the clients' losses at the point `start`, plus of the changes to other points.

    Both are made robust by themselves. A client whose loss is large at every point (its data are hard) is still heard
    when it says which of two models is better.
    """
    at_start = losses[:, start : start + 1]
    changes = losses - at_start
    if judgement == "guarded":
        bounded = _clipped(at_start, suspects) + _clipped(changes, suspects)
        floor = losses.amin().clamp(max=0)  # only a user's own loss is ever below 0
        return (bounded.clamp_min(floor) * weights).sum(0) / weights.sum()
    choose = {"trimmed": _trimmed, "median": _median}[judgement]
    return choose(at_start, weights, suspects) + choose(changes, weights, suspects)


def _contested(plain: Tensor, bounded: Tensor) -> bool:
    """Whether a few clients decide the mean: its loss at the first point, or which point has the least loss."""
    loud = bool((plain[0] - bounded[0]).abs() > bounded[0].abs())
    return loud or bool(bounded[plain.argmin()] - bounded.min() > _CONTESTED * bounded.min().abs())


def _clipped(values: Tensor, suspects: int) -> Tensor:
    """Values bounded by column: by the largest magnitude that is left without the `suspects` largest ones."""
    most = values.abs().topk(suspects + 1, dim=0).values[-1]
    return values.clamp(-most, most)


def _trimmed(values: Tensor, weights: Tensor, cut: int) -> Tensor:
    """Weighted means by column, without the `cut` smallest and largest values."""
    ordered, order = values.sort(0)
    kept = slice(cut, len(values) - cut)
    shares = weights.expand_as(values).gather(0, order)[kept]
    return (ordered[kept] * shares).sum(0) / shares.sum(0)


def _median(values: Tensor, weights: Tensor, _cut: int) -> Tensor:
    """Weighted medians by column; the middle of two values where half of the weight lies on either side."""
    ordered, order = values.sort(0)
    below = weights.expand_as(values).gather(0, order).cumsum(0) / weights.sum()
    last = torch.full_like(below[:1], len(values) - 1, dtype=torch.long)
    ends = [torch.minimum((below < 0.5 + slack).sum(0, keepdim=True), last) for slack in (-1e-9, 1e-9)]
    return sum((ordered.gather(0, end)[0] for end in ends), torch.zeros_like(ordered[0])) / 2


def shares(values: Sequence[State], suspects: int, parameters: Collection[str] = ()) -> list[float]:
    """Factors from 0 to 1 on the clients' weights in the mean of a statistic: less for clients with huge tensors.

    A tensor's usual norm is the largest that is left without the `suspects` largest ones. A client whose norm is more
    than four times as large gets the factor that brings it down to the usual norm. The smallest factor over a client's
    tensors holds for all of them: they were measured together, and if only one shrank they would not fit each other.

    Parameters
    ----------
    values
        Each client's statistic, all with the same names.
    suspects
        How many clients may lie, a minority.
    parameters
        Names of the model's parameters: where a statistic is of parameters, a weight and its bias count as one tensor.

    Examples
    --------
    >>> shares([{"w": torch.ones(1)}, {"w": -torch.ones(1)}, {"w": torch.full((1,), 1e6)}], 1)
    [1.0, 1.0, 1e-06]
    """
    groups: dict[str, list[str]] = {}
    for name in values[0]:
        groups.setdefault(name.rpartition(".")[0] if name in parameters else name, []).append(name)
    factors = [1.0] * len(values)
    for names in groups.values():
        norms = [math.hypot(*(float(value[name].double().norm()) for name in names)) for value in values]
        most = sorted(norms)[-1 - suspects]
        pairs = zip(factors, norms, strict=True)
        factors = [min(factor, most / norm) if norm > _FAR * most else factor for factor, norm in pairs]
    return factors


def evened(label_weights: Sequence[float], suspects: int) -> list[float]:
    """Factors from 0 to 1 on the clients' weights in the mean of a statistic: less where labels count for too much.

    In most statistics a label counts for at most 1, and a client that multiplies its labels would get more say. Under
    class weights labels may count for more, and only clients need know of these weights. So the bound is 1, or the
    largest label weight that is left without the `suspects` largest ones.

    Examples
    --------
    >>> evened([1.0, 1.0, 4.0], 1), evened([2.0, 3.0, 4.0], 1)
    ([1.0, 1.0, 0.25], [1.0, 1.0, 0.75])
    """
    most = max(1.0, sorted(label_weights)[-1 - suspects])
    return [most / weight if weight > _HEAVIER * most else 1.0 for weight in label_weights]
