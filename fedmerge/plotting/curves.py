"""The numbers behind the convergence figure: means over seeds, confidence bands, axis limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from fedmerge.errors import InvalidOption, RecordError
from fedmerge.plotting.runs import STEPS, Run, by_method, main_measure

__all__ = ["Curve", "accuracy_limits", "curves", "half_width", "spans_decades", "uploads"]

Floats = NDArray[np.float64]

MEGABYTE = 1e6
LOSSES_APART = 20.0  # the largest mean loss is so many times the smallest: a linear axis would flatten the small
BAND_ROOM = 0.15  # of the range of the means: how far a band may widen the axis at either end


@dataclass(frozen=True)
class Curve:
    """One method's mean over seeds: accuracy in percent, or the loss, against costs, which start at zero."""

    method: str
    seeds: int
    accuracy: Floats
    half_width: Floats | None  # of the confidence band; None for a single seed
    rounds: Floats
    megabytes: Floats
    seconds: Floats
    steps: Floats | None = None  # optimiser steps of all clients; None where a run does not count them
    measure: str = "test_accuracy"

    @property
    def axis(self) -> str:
        """The name of the measure's axis."""
        return "test loss" if self.measure == "test_loss" else "test accuracy (%)"

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which the measure lies."""
        return (0.0, np.inf) if self.measure == "test_loss" else (0.0, 100.0)


def curves(runs: Sequence[Run], confidence: float = 0.95) -> list[Curve]:
    """One curve per method, best final accuracy first; of the loss, lowest first, where there is no accuracy.

    A curve has the rounds that every seed of its method evaluated, so that no point is a mean over
    fewer seeds than its neighbours (a curve would jump where a seed ends).

    Raises
    ------
    InvalidOption
        `confidence` is not in (0, 1).
    RecordError
        No round of a method was evaluated with every seed.
    """
    if not 0 < confidence < 1:
        raise InvalidOption(f"confidence lies in (0, 1), not {confidence}. For 95 % write 0.95.")
    measure = main_measure(runs)
    drawn = [_curve(method, group, confidence, measure) for method, group in by_method(runs).items()]
    return sorted(drawn, key=lambda curve: curve.accuracy[-1] if measure == "test_loss" else -curve.accuracy[-1])


def half_width(values: Floats, confidence: float) -> Floats | None:
    """Half the confidence interval of the mean over axis 0 (seeds): t * s / sqrt(n).

    s is the sample standard deviation and t the quantile of Student's distribution with n - 1 degrees of
    freedom; None where n = 1.
    """
    n = len(values)
    if n < 2:
        return None
    t = float(stdtrit(n - 1, 0.5 + confidence / 2))
    width: Floats = t * values.std(axis=0, ddof=1) / np.sqrt(n)
    return width


def spans_decades(drawn: Sequence[Curve]) -> bool:
    """Whether losses differ so much that their axis should be logarithmic; an accuracy's never is."""
    means = np.concatenate([curve.accuracy for curve in drawn])
    low, high = float(means.min()), float(means.max())
    return drawn[0].measure == "test_loss" and 0 < LOSSES_APART * low < high < np.inf


def accuracy_limits(drawn: Sequence[Curve], target: float | None) -> tuple[float, float]:
    """Limits of the axis, accuracy in percent or loss: every mean and the target in view, with a little air.

    Bands may widen the axis, but only so far: two seeds give a t of 12.7, and a band of such a width would
    press all curves flat. On a logarithmic axis the air is a factor, and bands widen nothing.
    """
    if spans_decades(drawn):
        means = np.concatenate([curve.accuracy for curve in drawn])
        air = float(means.max() / means.min()) ** 0.06
        return float(means.min()) / air, float(means.max()) * air
    means = np.concatenate([curve.accuracy for curve in drawn])
    wanted = means if target is None else np.append(means, 100 * target)
    low, high = float(wanted.min()), float(wanted.max())
    least, most = drawn[0].bounds
    span = max(high - low, 5.0 if most == 100 else 1e-6 + 0.05 * high)
    ends = [
        (np.min(curve.accuracy - curve.half_width), np.max(curve.accuracy + curve.half_width))
        for curve in drawn
        if curve.half_width is not None
    ]
    bottom = min([low, *(max(float(end[0]), low - BAND_ROOM * span, least) for end in ends)])
    top = max([high, *(min(float(end[1]), high + BAND_ROOM * span, most) for end in ends)])
    return bottom - 0.04 * span, top + 0.04 * span


def _curve(method: str, runs: Sequence[Run], confidence: float, measure: str) -> Curve:
    rounds = sorted(set.intersection(*(_evaluated(run, measure) for run in runs)))
    if not rounds:
        seeds = ", ".join(str(run.seed) for run in runs)
        raise RecordError(
            f"{method}: no round was evaluated with every seed ({seeds}), so there is no curve to draw. "
            f"See {runs[0].folder}; evaluate the same rounds with every seed, or leave the method out."
        )
    accuracy = _stack(runs, rounds, (measure,), cumulative=False) * (1 if measure == "test_loss" else 100)
    return Curve(
        method=method,
        seeds=len(runs),
        accuracy=accuracy.mean(axis=0),
        half_width=half_width(accuracy, confidence),
        rounds=np.array(rounds, dtype=np.float64),
        megabytes=_stack(runs, rounds, ("bytes_down", "bytes_up")).mean(axis=0) / MEGABYTE,
        seconds=_stack(runs, rounds, ("seconds_train", "seconds_merge")).mean(axis=0),
        steps=_stack(runs, rounds, (STEPS,)).mean(axis=0) if all(map(_counts_steps, runs)) else None,
        measure=measure,
    )


def uploads(runs: Sequence[Run], drawn: Sequence[Curve]) -> dict[str, Floats]:
    """Megabytes that clients had sent by each round of each curve, mean over seeds."""
    groups = by_method(runs)
    return {
        curve.method: _stack(groups[curve.method], [int(r) for r in curve.rounds], ("bytes_up",)).mean(axis=0)
        / MEGABYTE
        for curve in drawn
    }


def _counts_steps(run: Run) -> bool:
    return all(row.get(STEPS) is not None for row in run.rows)


def _evaluated(run: Run, measure: str) -> set[int]:
    return {row["round"] for row in run.rows if row[measure] is not None}


def _stack(runs: Sequence[Run], rounds: Sequence[int], keys: Sequence[str], cumulative: bool = True) -> Floats:
    """[seeds, rounds]: the sum of `keys` in each round of `rounds`, or the running total up to it."""
    wanted, table = set(rounds), []
    for run in runs:
        # Rounds without an evaluation cost bytes and seconds too: total over all rows, then pick.
        picked = [index for index, row in enumerate(run.rows) if row["round"] in wanted]
        values = np.array([sum(row[key] or 0 for key in keys) for row in run.rows], dtype=np.float64)
        table.append((values.cumsum() if cumulative else values)[picked])
    return np.stack(table)
