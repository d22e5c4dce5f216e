"""Names at the ends of curves: nudged apart so that none covers another, left out where there is no room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedmerge.plotting.curves import Curve
from fedmerge.plotting.style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LABEL_SIZE", "name_ends", "place", "spread"]

LABEL_SIZE = 7.5  # points
LONGEST = 24  # characters: room for a longer name would be taken from the panels
REACH = 5.0  # label heights that a name may stand away from the end of its curve


def name_ends(figure: Figure, axes: Axes, drawn: Sequence[Curve], looks: Mapping[str, Style]) -> None:
    """Names right of the first panel, a thin line from each to its curve; the layout makes room for them."""
    last = max(float(curve.rounds[-1]) for curve in drawn)
    # A curve that ends early ends among the others: its name would cover them.
    named = [curve for curve in drawn if curve.rounds[-1] == last and len(curve.method) <= LONGEST]
    figure.draw_without_rendering()  # the layout decides how tall the panel is
    height = 1.25 * LABEL_SIZE / 72 * figure.dpi / axes.bbox.height
    low, high = axes.get_ylim()
    ends = [(float(curve.accuracy[-1]) - low) / (high - low) for curve in named]
    for index, middle in place(ends, height).items():
        curve = named[index]
        axes.annotate(
            curve.method,
            xy=(last, float(curve.accuracy[-1])),
            xytext=(1.05, middle),
            textcoords="axes fraction",
            va="center",
            fontsize=LABEL_SIZE,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": looks[curve.method].colour,
                "linewidth": 0.7,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def place(ends: Sequence[float], height: float) -> dict[int, float]:
    """Where to put the names of curves that end at `ends` (0 to 1, bottom to top of the axes).

    Parameters
    ----------
    ends
        The heights at which the curves end, the most important first.
    height
        Of one name, in the same unit.

    Returns
    -------
    dict of int to float
        Index of the curve to the middle of its name. A curve is left out if its name would have
        to stand too far off, or would push an earlier one too far off.

    Examples
    --------
    >>> place([0.5, 0.5], 0.1)
    {0: 0.55, 1: 0.45}
    """
    chosen: list[int] = []
    found: list[float] = []
    for index in range(len(ends)):
        # Equal ends keep the order of importance, from the top down.
        trial = sorted([*chosen, index], key=lambda i: (ends[i], -i))
        middles = spread([ends[i] for i in trial], height)
        off = [abs(middle - ends[i]) for middle, i in zip(middles, trial, strict=True)]
        inside = middles[0] >= -1e-9 and middles[-1] <= 1 + 1e-9
        if inside and max(off) <= REACH * height:
            chosen, found = trial, middles
    return dict(sorted(zip(chosen, found, strict=True)))


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, as near as can be to the ascending `wanted` ones (least squares).

    Subtracting `index * gap` turns "at least `gap` apart" into "ascending", whose least-squares answer
    averages neighbours that are out of order until none is left. The result stays within 0 and 1 if it can.
    """
    groups: list[tuple[float, int]] = []  # mean, size
    for index, value in enumerate(wanted):
        mean, size = value - index * gap, 1
        while groups and groups[-1][0] > mean:
            before, count = groups.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        groups.append((mean, size))
    top = 1 - (len(wanted) - 1) * gap
    flat = [min(max(mean, 0.0), top) for mean, size in groups for _ in range(size)]
    return [value + index * gap for index, value in enumerate(flat)]
