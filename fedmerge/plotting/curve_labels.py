"""Names at the ends of curves: nudged apart so that none covers another, none left out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedmerge.plotting.curves import Curve, Floats
from fedmerge.plotting.style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LABEL_SIZE", "name_ends", "place", "spread", "wrapped"]

LABEL_SIZE = 7.5  # points
LONGEST = 24  # characters of a line: room for a longer one would be taken from the panels


def name_ends(
    figure: Figure, axes: Axes, drawn: Sequence[Curve], looks: Mapping[str, Style], xs: Sequence[Floats]
) -> None:
    """Names right of a panel whose curves stand at `xs`, a thin line from each to its curve.

    The figure grows where they need more room.
    """
    names = [wrapped(curve.method) for curve in drawn]
    figure.draw_without_rendering()  # the layout decides how tall the panel is
    line = 1.25 * LABEL_SIZE / 72 * figure.dpi / axes.bbox.height
    lack = sum(line * (1 + name.count("\n")) for name in names)
    if lack > 1:
        figure.set_figheight(figure.get_figheight() + (lack - 1) * axes.bbox.height / figure.dpi)
        line /= lack
    to_axes = axes.transData + axes.transAxes.inverted()  # the axis may be logarithmic
    ends = [float(to_axes.transform((1.0, float(curve.accuracy[-1])))[1]) for curve in drawn]
    heights = [line * (1 + name.count("\n")) for name in names]
    for curve, name, middle, x in zip(drawn, names, place(ends, heights), xs, strict=True):
        axes.annotate(
            name,
            xy=(float(x[-1]), float(curve.accuracy[-1])),
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


def wrapped(name: str) -> str:
    """A method's name in lines of at most 24 characters, broken at its options and steps.

    Examples
    --------
    >>> print(wrapped("krum(attackers=1,selected=12)+server_momentum"))
    krum(attackers=1,
    selected=12)
    +server_momentum
    """
    spaced = name.replace(",", ", ").replace("+", " +").replace("  ", " ")
    return "\n".join(textwrap.wrap(spaced, LONGEST, break_on_hyphens=False)) or name


def place(ends: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Where to put the names of curves that end at `ends` (0 to 1, bottom to top of the axes).

    Parameters
    ----------
    ends
        The heights at which the curves end, the most important first.
    heights
        Of the names, in the same unit.

    Returns
    -------
    list of float
        The middle of each name, in the order of `ends`: as near to the end as can be, none over another, and within
        the axes if all of them fit.

    Examples
    --------
    >>> place([0.5, 0.5], [0.1, 0.1])
    [0.55, 0.45]
    """
    # Equal ends keep the order of importance, from the top down.
    order = sorted(range(len(ends)), key=lambda i: (ends[i], -i))
    middles = spread([ends[i] for i in order], [heights[i] for i in order])
    places = dict(zip(order, middles, strict=True))
    return [places[i] for i in range(len(ends))]


def spread(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Middles of names of such heights that do not overlap, as near as can be to the ascending `wanted` ones.

    Subtracting what stands below each name turns "apart" into "ascending", whose least-squares answer averages
    neighbours that are out of order until none is left. The names stay within 0 and 1 if they can.
    """
    below: list[float] = []
    for index, height in enumerate(heights):
        below.append(0.0 if index == 0 else below[-1] + (heights[index - 1] + height) / 2)
    groups: list[tuple[float, int]] = []  # mean, size
    for value, offset in zip(wanted, below, strict=True):
        mean, size = value - offset, 1
        while groups and groups[-1][0] > mean:
            before, count = groups.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        groups.append((mean, size))
    top = 1 - below[-1] if below else 1.0
    flat = [min(max(mean, 0.0), max(top, 0.0)) for mean, size in groups for _ in range(size)]
    return [value + offset for value, offset in zip(flat, below, strict=True)]
