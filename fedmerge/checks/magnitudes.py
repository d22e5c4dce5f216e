"""How large numbers may be: a client's beside those of the model sent and of most others, and merged ones at all."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from statistics import median_low
from typing import NamedTuple

import torch
from torch import Tensor

from fedmerge.errors import BadUpdate, FedMergeError
from fedmerge.state import LARGEST, State, as_rows, extent, is_norm_statistic
from fedmerge.update import ClientUpdate

__all__ = [
    "Outliers", "Peaks", "bounded", "bounded_state", "check_buffer", "check_step", "fine_rows", "peaks_of_rows",
]  # fmt: skip

log = logging.getLogger("fedmerge")

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


MOST_GROWTH = 10_000_000
"""How far whole numbers in a buffer may leave the range of the model sent: more steps than any client takes a round."""


def check_buffer(client: int, name: str, tensor: Tensor, masks: Collection[str], start: Tensor | None) -> None:
    """Check one tensor, in the model's type, that may be a buffer, against that of the model sent, where there is one.

    Raises
    ------
    BadUpdate
        A negative variance or count, whole numbers far from the model's, NaN, or what is infinite or huge in a mask
        and is not so in the model's.
    """
    number = tensor.is_floating_point() or tensor.is_complex()
    if (number and name not in masks and not is_norm_statistic(name)) or bool(
        fine_rows(name, tensor[None], masks, start).all()
    ):
        return
    if number:
        what = "a negative variance" if is_norm_statistic(name) else f"entries beyond {LARGEST:g}"
        raise BadUpdate(client, f"buffer {name!r} has {what}, unlike the model sent", "Do not change what masks.")
    raise BadUpdate(
        client,
        f"buffer {name!r} counts to {_farthest(tensor)}, which no training does from {_told(start)}",
        "Start from the model that the server sent.",
    )


def fine_rows(name: str, stacked: Tensor, masks: Collection[str], start: Tensor | None) -> Tensor:
    """For tensors of K clients [K, ...] that may be buffers, which of them may be merged [K].

    How large parameters and running statistics are is not looked at here.

    Examples
    --------
    >>> fine_rows("norm.running_var", torch.tensor([[0.5], [-1.0]]), (), None).tolist()
    [True, False]
    """
    rows = as_rows(stacked)
    fine = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if not rows.shape[1] or rows.dtype == torch.bool:
        return fine
    if rows.is_floating_point() or rows.is_complex():
        if name.endswith("running_var") and not rows.is_complex():
            return rows.amin(1) >= 0
        known = name in masks and start is not None and start.shape == stacked.shape[1:]
        return _as_masked(rows, as_rows(start[None]).to(rows.device)) if known else fine  # type: ignore[index]
    low, high = rows.amin(1), rows.amax(1)
    if name.endswith("num_batches_tracked"):
        fine = low >= 0
    if start is None or not start.numel():
        return fine
    least, most = min(int(start.min()), 0) - MOST_GROWTH, max(int(start.max()), 0) + MOST_GROWTH
    limits = torch.iinfo(rows.dtype)
    return fine & (low >= max(least, limits.min)) & (high <= min(most, limits.max))


def _as_masked(rows: Tensor, own: Tensor) -> Tensor:
    """Whether all that is huge or infinite in a mask is so in the model's, NaN aside."""
    return ((rows == own) | rows.isnan() | (rows.abs() <= LARGEST)).all(1)


def _farthest(tensor: Tensor) -> int:
    low, high = int(tensor.min()), int(tensor.max())
    return low if -low > high else high


def _told(start: Tensor | None) -> str:
    return "the model sent" if start is None or not start.numel() else f"{_farthest(start)} in the model sent"


def bounded(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, where all of it fits into the type of `like` and is at most ``LARGEST``; otherwise cut to that.

    NaN stays.

    Examples
    --------
    >>> bounded(torch.tensor([7e4, -1.0]), torch.zeros(2, dtype=torch.float16)).tolist()
    [65504.0, -1.0]
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    limit = min(LARGEST, torch.finfo(like.dtype).max)
    if extent(tensor) <= limit:
        return tensor
    if tensor.is_complex():
        return torch.view_as_complex(torch.view_as_real(tensor.resolve_conj()).clamp(-limit, limit))
    return tensor.clamp(-limit, limit)


def bounded_state(merged: State, method: str, like: State | None = None) -> dict[str, Tensor]:
    """Parameters that `method` has merged, cut to the range of the types in `like`, or of their own; a warning says so.

    Raises
    ------
    FedMergeError
        There is NaN in them.
    """
    found = {name: bounded(tensor, tensor if like is None else like[name]) for name, tensor in merged.items()}
    cut = [name for name, tensor in found.items() if tensor is not merged[name]]
    for name in cut:
        if bool(merged[name].isnan().any()):
            raise FedMergeError(
                f"{method} gave NaN in {name!r} from finite updates: lower its step sizes, "
                "or the clients' learning rate"
            )
    if cut:
        log.warning("%s: %s left the range of the model's numbers and was cut", method, ", ".join(map(repr, cut[:3])))
    return found


_STEPS_LEAP = 1e3
"""How many times as far as its inputs a sensible server step goes at most, momentum over many rounds included."""


def check_step(stepped: State, inputs: tuple[State, State], step: str) -> None:
    """Make sure that a server step, from a model to the merged one, is not what leaves the range of numbers.

    Where the inputs are near the end of the range already it is no fault of the step, and :func:`bounded_state` cuts.

    Raises
    ------
    FedMergeError
        It is: its options are out of all proportion.
    """
    known = max((extent(tensor) for state in inputs for tensor in state.values()), default=0.0)
    for name, tensor in stepped.items():
        if known <= LARGEST / _STEPS_LEAP and not extent(tensor) <= LARGEST:
            raise FedMergeError(f"{step} left the range of numbers in {name!r}: lower its learning rate")
