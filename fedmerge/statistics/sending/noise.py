"""Clipping and Gaussian noise: what keeps a client's sums from telling of any single example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.state import State
from fedmerge.statistics.layer_statistic import Bounded
from fedmerge.statistics.statistic_type import Statistic

__all__ = ["NoisySums"]


@dataclass(frozen=True)
class NoisySums:
    """Differential privacy of what clients send about a merged model: clipped examples, Gaussian noise on sums.

    Each answer is a Gaussian mechanism (Dwork and Roth 2014) for data sets that differ in one example replaced by one
    that adds nothing, so that numbers of examples are public; where it is replaced by any other, halve the multiplier.
    Each of the parts of an answer, divided by the most that an example adds to it, has noise of standard deviation
    ``noise_multiplier * sqrt(parts)``: that protects all parts at once.
    :func:`fedmerge.privacy.accountant.epsilon` says what a number of answers has cost.

    Parameters
    ----------
    clip
        Longest norm of an example's features, a final 1 for the bias included.
    noise_multiplier
        Standard deviation of the noise in units of what one example can change, above 0.
    loss_clip
        Largest loss of an example that judges models.
    sharers
        Among so many clients the noise is divided, each adding ``1 / sharers`` of its variance. 1 protects each
        client's own answer. More is as good only if the server sees nothing but the sum, and if so many add theirs.

    Raises
    ------
    InvalidOption
        A value out of range.

    Examples
    --------
    >>> NoisySums(clip=2.0, noise_multiplier=3.0).deviation(4.0, parts=4)
    24.0
    """

    clip: float
    noise_multiplier: float
    loss_clip: float = 4.0
    sharers: int = 1

    def __post_init__(self) -> None:
        for name in ("clip", "noise_multiplier", "loss_clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value > 0):
                raise InvalidOption(f"NoisySums: {name} must be a positive number, got {value!r}")
        if isinstance(self.sharers, bool) or not isinstance(self.sharers, int) or self.sharers < 1:
            raise InvalidOption(f"NoisySums: sharers must be a number of clients, at least 1, got {self.sharers!r}")

    def applied(self, statistic: Statistic) -> Bounded:
        """`statistic` with clipped examples.

        Raises
        ------
        InvalidOption
            It is not known how much one example adds to it.
        """
        if not isinstance(statistic, Bounded):
            raise InvalidOption(
                f"statistic {statistic.name!r} cannot be sent with noise, for what one example adds to it has no known "
                "bound: leave out what needs it (ridge_head and logistic_head can have noise), or go without noise"
            )
        return replace(statistic, clip=self.clip)

    def deviation(self, bound: float, parts: int) -> float:
        """Standard deviation of what one client adds to a sum to which one example adds `bound` at most."""
        return self.noise_multiplier * bound * sqrt(parts / self.sharers)

    def noisy(
        self,
        kinds: Sequence[Bounded],
        values: Sequence[State],
        n: int,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float64,
    ) -> list[State]:
        """A client's means over `n` examples, or as many as a statistic takes, with the noise of sums, as `dtype`."""
        noisy_values: list[State] = []
        for kind, deviations, value in zip(kinds, self._deviations(kinds), values, strict=True):
            taken = n if kind.examples is None else min(n, kind.examples)
            noisy_values.append(
                {
                    name: _with_noise(t, deviations[_part(name)] / taken, generator).to(dtype)
                    for name, t in value.items()
                }
            )
        return noisy_values

    def check(self, kinds: Sequence[Bounded], values: Mapping[str, State], n: int) -> None:
        """Make sure that a client's means over `n` examples are what clipped examples and this noise can give.

        Raises
        ------
        InvalidOption
            An entry lies more than eight standard deviations beyond the most that examples add.
        """
        for kind, deviations in zip(kinds, self._deviations(kinds), strict=True):
            taken = max(1, n if kind.examples is None else min(n, kind.examples))
            for name, tensor in values[kind.name].items():
                part = _part(name)
                most = kind.bounds()[part] + 8 * deviations[part] / taken
                if tensor.numel() and not float(tensor.abs().max()) <= most:
                    raise InvalidOption(f"statistic {kind.name!r}: {name!r} has entries beyond {most:g}")

    def noisy_losses(self, losses: Tensor, generator: torch.Generator) -> Tensor:
        """[points], a client's clipped sums, with noise; an example adds to all points."""
        return losses + _normal(losses, generator) * self._loss_deviation(losses)

    def doubted(self, losses: Tensor, clients: int) -> Tensor:
        """[points], the sums of so many clients, with three standard deviations of a difference on all but the first.

        The first point is the present model, which luck in the noise alone is no reason to leave.
        """
        doubt = torch.full_like(losses, 3 * sqrt(2) * self._loss_deviation(losses) * sqrt(clients))
        doubt[:1] = 0
        return losses + doubt

    def _loss_deviation(self, losses: Tensor) -> float:
        return self.deviation(self.loss_clip * sqrt(len(losses)), 1)

    def steadied(
        self, kinds: Sequence[Bounded], values: Mapping[str, State], n: int, clients: int
    ) -> dict[str, dict[str, Tensor]]:
        """All clients' means, with matrices that were symmetric and had no negative eigenvalues such again.

        ``(Z + Z^T) / 2`` of d by d normal numbers has eigenvalues to about ``-sqrt(2 d)``: so much is added to the
        diagonal, as in ridge regression with sufficient statistics (Wang 2018), and what is still negative is set to 0.
        """
        usable = {}
        for deviations, kind in zip(self._deviations(kinds), kinds, strict=True):
            usable[kind.name] = dict(values[kind.name])
            for name, tensor in values[kind.name].items():
                if _part(name) in kind.moments:
                    edge = deviations[_part(name)] * sqrt(2 * len(tensor) * clients) / max(1, n)
                    usable[kind.name][name] = _without_negative((tensor + tensor.T) / 2, edge)
        return usable

    def _deviations(self, kinds: Sequence[Bounded]) -> list[dict[str, float]]:
        parts = sum(len(kind.bounds()) for kind in kinds)
        return [{part: self.deviation(bound, parts) for part, bound in kind.bounds().items()} for kind in kinds]


def _with_noise(tensor: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return tensor.double() + deviation * _normal(tensor, generator)


def _without_negative(moments: Tensor, shift: float) -> Tensor:
    values, vectors = torch.linalg.eigh(moments)
    mended: Tensor = (vectors * (values + shift).clamp_min(0)) @ vectors.T
    return mended


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, dtype=torch.float64, generator=generator).to(like.device)


def _part(name: str) -> str:
    return name.rpartition(".")[2]
