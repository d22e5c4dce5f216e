"""Clients whose numbers dwarf those of the model sent and of most other clients."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from statistics import median_low
from typing import NamedTuple

import torch

from fedmerge.errors import BadUpdate
from fedmerge.state import State, as_rows, extent, is_norm_statistic
from fedmerge.update import ClientUpdate

__all__ = ["Outliers", "Peaks", "peaks_of_rows"]

LEAP = 1e3
"""How many times as large as those of the model sent, or of most clients, a client's parameters may be."""
STATISTICS_LEAP = LEAP**2
"""The same for running statistics of norms: a variance goes by the square of what it is of."""


class Peaks(NamedTuple):
    """The largest magnitude among a client's parameters, and among its running statistics."""

    parameters: float = 0.0
    statistics: float = 0.0

    @classmethod
    def of(cls, state: State, masks: Collection[str]) -> Peaks:
        """Those of a state; what is no number of training (NaN, masks) does not count."""
        sizes = [(is_norm_statistic(name), extent(tensor)) for name, tensor in state.items() if name not in masks]
        sizes = [(statistic, size) for statistic, size in sizes if size < math.inf]
        return cls(*(max((size for is_one, size in sizes if is_one is kind), default=0.0) for kind in (False, True)))


def peaks_of_rows(states: State, masks: Collection[str]) -> list[Peaks]:
    """Those of many clients, tensors [K, ...]; NaN where one has a NaN.

    Examples
    --------
    >>> peaks_of_rows({"w": torch.tensor([[1.0, -2.0], [0.0, 0.5]])}, ())
    [Peaks(parameters=2.0, statistics=0.0), Peaks(parameters=0.5, statistics=0.0)]
    """
    count = len(next(iter(states.values())))
    peaks = {False: torch.zeros(count), True: torch.zeros(count)}
    for name, stacked in states.items():
        real = torch.view_as_real(stacked.resolve_conj()) if stacked.is_complex() else stacked
        rows = as_rows(real)
        if name in masks or not rows.is_floating_point() or not rows.shape[1]:
            continue
        kind = is_norm_statistic(name)
        peaks[kind] = torch.maximum(peaks[kind], torch.maximum(rows.amax(1), -rows.amin(1)).cpu())
    return [Peaks(*pair) for pair in zip(peaks[False].tolist(), peaks[True].tolist(), strict=True)]


@dataclass
class Outliers:
    """Holds clients back whose numbers dwarf the model's, until all others are known; leaves out whom few are like.

    A client whose training diverged, or that lies as loudly, is told from a federation that trains far: there, most
    are as large. So no client alone can send what overflows, or what others cannot train on from. Numbers up to a
    thousand are never held back, and running statistics up to a million.

    Parameters
    ----------
    start
        Peaks of the model sent.
    active
        Whether to look at all.

    Examples
    --------
    >>> outliers = Outliers(Peaks(1.0, 1.0))
    >>> loud = ClientUpdate(7, {"w": torch.tensor([1e9])})
    >>> [outliers.holds(ClientUpdate(0, {}), Peaks(2.0, 1.0)), outliers.holds(loud, Peaks(1e9, 1.0))]
    [False, True]
    >>> next(outliers.decided()).reason
    'its parameters reach 1e+09, more than 1000 times those of the model sent and of most clients'
    """

    start: Peaks = field(default_factory=Peaks)
    active: bool = True
    seen: list[Peaks] = field(default_factory=list)
    aside: list[tuple[ClientUpdate, Peaks]] = field(default_factory=list)

    def leaps(self, peaks: Peaks) -> bool:
        """Whether a client with these peaks has to wait for the others."""
        return self.active and bool(_beyond(peaks, _limits([self.start])))

    def holds(self, update: ClientUpdate, peaks: Peaks) -> bool:
        """Note one client; whether it has been held back."""
        if not self.leaps(peaks):
            self.seen.append(peaks)
            return False
        self.aside.append((update, peaks))
        return True

    def join(self, other: Outliers) -> Outliers:
        """The clients of both."""
        return Outliers(self.start, self.active, self.seen + other.seen, self.aside + other.aside)

    def decided(self) -> Iterator[ClientUpdate | BadUpdate]:
        """Those held back, in order, or why they are left out; called when all have been noted."""
        aside, self.aside = self.aside, []
        everybody = [*self.seen, *(peaks for _, peaks in aside)]
        self.seen = everybody
        for update, peaks in sorted(aside, key=lambda one: one[0].client):
            usual = Peaks(*(median_low(kind) for kind in zip(*everybody, strict=True)))
            beyond = _beyond(peaks, _limits([self.start, usual]))
            yield BadUpdate(update.client, beyond, "Lower its learning rate or clip gradients.") if beyond else update


def _limits(known: list[Peaks]) -> Peaks:
    return Peaks(
        LEAP * max(1.0, *(peaks.parameters for peaks in known)),
        STATISTICS_LEAP * max(1.0, *(peaks.statistics for peaks in known)),
    )


def _beyond(peaks: Peaks, limits: Peaks) -> str:
    """What is too large and how much, in words; none where nothing is."""
    told = (("parameters", LEAP), ("running statistics", STATISTICS_LEAP))
    for (name, leap), size, limit in zip(told, peaks, limits, strict=True):
        if size > limit:
            known = "those of the model sent and of most clients"
            return f"its {name} reach {size:.3g}, more than {leap:.0f} times {known}"
    return ""
