"""The convergence figure: accuracy against rounds, megabytes, local steps and seconds, a curve per method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedmerge.errors import InvalidOption, UnknownName
from fedmerge.plotting.canvas import blank, log_axis, page_grid, page_width, picture_path, save
from fedmerge.plotting.curve_labels import LABEL_SIZE, name_ends
from fedmerge.plotting.curves import Curve, Floats, accuracy_limits, curves, spans_decades
from fedmerge.plotting.runs import read_runs
from fedmerge.plotting.style import Style, styles
from fedmerge.plotting.summary import check_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_convergence", "plot_convergence"]

PANEL_WIDTH = 10 / 3
MARKS = 7  # markers on a curve
WIDE_RANGE = 10.0  # the dearest method costs so many times the cheapest: a linear axis would flatten the cheap


def plot_convergence(
    folders: Sequence[Path],
    out: Path,
    *,
    target: float | None = None,
    confidence: float = 0.95,
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    against: Sequence[str] | None = None,
) -> Path:
    """Draw test accuracy against rounds, megabytes sent, local steps (where all runs count them) and seconds spent.

    In tasks without an accuracy it is the test loss.

    Each method is one curve: the mean over its seeds, with a confidence band (Student's t over seeds in
    each round) where it has two seeds or more. Costs are running totals, mean over seeds; their axis turns
    logarithmic (and then leaves out the free round 0) when methods differ by more than a factor of 10.

    Parameters
    ----------
    folders
        Run folders or comparison folders, as for `read_runs`.
    out
        The file to write (.png, .pdf or .svg), or a folder, which then gets a `convergence.png`.
    target
        A test accuracy in (0, 1] to mark with a line; left out where runs have a loss alone, as in a regression.
    confidence
        Of the bands, in (0, 1).
    labels
        One for each folder, to draw comparisons with the same methods together.
    columns
        For print, as wide as one column (3.4 inches) or two (7 inches), with letters of the size of captions. None is
        for the screen: all panels beside each other.
    against
        Some of ``"rounds"``, ``"megabytes"``, ``"steps"`` and ``"seconds"``, a panel each. By default all that the
        records count, and ``"rounds"`` alone in one column.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    RecordError
        As `read_runs`; a method has no round that was evaluated with every seed; the file cannot be written;
        matplotlib is missing.
    InvalidOption
        `target`, `confidence`, `columns`, `against` or the kind of file is out of range.

    Examples
    --------
    >>> plot_convergence([Path("runs/digits")], Path("runs/digits"), target=0.9)  # doctest: +SKIP
    PosixPath('runs/digits/convergence.png')
    """
    check_target(target)
    file = picture_path(out, "convergence.png")
    drawn = curves(read_runs(folders, labels), confidence)
    costs = _costs(drawn, ("rounds",) if against is None and columns == 1 else against)
    rows, across = page_grid(len(costs), columns)
    width = PANEL_WIDTH * across if columns is None else page_width(columns)
    with blank(width, (3.3 if columns is None else 2.4) * rows) as figure:
        draw_convergence(figure, drawn, target=target, confidence=confidence, against=tuple(costs), rows=rows)
        return save(figure, file)


def draw_convergence(
    figure: Figure,
    drawn: Sequence[Curve],
    *,
    target: float | None = None,
    confidence: float = 0.95,
    against: Sequence[str] | None = None,
    rows: int = 1,
) -> None:
    """Fill a blank figure with a panel for each cost, the legend below and the names at the curves' ends."""
    looks = styles(curve.method for curve in drawn)
    target = None if drawn[0].measure == "test_loss" else target
    costs = _costs(drawn, against)
    panels = figure.subplots(rows, len(costs) // rows, sharey=True, squeeze=False).flatten()
    for axes, (xs, label) in zip(panels, costs.values(), strict=True):
        _panel(axes, drawn, xs, looks, log=label != "round" and _wide(xs))
        axes.set_xlabel(f"{label}, log scale" if axes.get_xscale() == "log" else label)
        if target is not None:
            axes.axhline(100 * target, color="0.35", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    for axes in panels[:: len(costs) // rows]:
        axes.set_ylabel(drawn[0].axis)
    if spans_decades(drawn):
        log_axis(panels[0].yaxis)
        panels[0].set_ylabel(f"{drawn[0].axis}, log scale")
    panels[0].set_ylim(*accuracy_limits(drawn, target))
    if "rounds" in costs:
        panels[list(costs).index("rounds")].locator_params(axis="x", integer=True, nbins=6)
    if target is not None:
        _name_target(panels[-1], target, beside=len(panels) > 1)
    _legend(figure, panels[0], _caption(drawn, confidence))
    name_ends(figure, panels[0], drawn, looks, next(xs for xs, _ in costs.values()))


def _costs(drawn: Sequence[Curve], against: Sequence[str] | None) -> dict[str, tuple[list[Floats], str]]:
    """What accuracy is drawn against, a panel each: what every curve has spent by each of its points."""
    steps = [curve.steps for curve in drawn if curve.steps is not None]
    known = {
        "rounds": ([curve.rounds for curve in drawn], "round"),
        "megabytes": ([curve.megabytes for curve in drawn], "megabytes sent (up + down)"),
        "steps": (steps, "local steps (all clients)"),
        "seconds": ([curve.seconds for curve in drawn], "seconds (training + merging)"),
    }
    if len(steps) != len(drawn):
        if against is not None and "steps" in against:
            raise InvalidOption("not every run counts its local steps: leave 'steps' out of against")
        del known["steps"]
    for name in against or ():
        if name not in known:
            raise UnknownName("cost to draw against", name, known)
    return known if against is None else {name: known[name] for name in dict.fromkeys(against)}


def _panel(axes: Axes, drawn: Sequence[Curve], xs: Sequence[Floats], looks: dict[str, Style], log: bool) -> None:
    if log:
        log_axis(axes.xaxis)
    # Faint enough that the bands of many methods lie over each other without hiding a line.
    alpha = max(0.05, 0.22 / math.sqrt(len(drawn)))
    for index, (curve, x) in enumerate(zip(drawn, xs, strict=True)):
        look = looks[curve.method]
        shown = x > 0 if log else np.full(len(x), True)
        axes.plot(
            x[shown],
            curve.accuracy[shown],
            color=look.colour,
            dashes=look.dashes or (None, None),
            marker=look.marker,
            markersize=4.5,
            markerfacecolor=look.colour if look.filled else "white",
            markeredgewidth=1.0,
            markevery=_marked(int(shown.sum()), index, len(drawn)),
            label=curve.method,
            zorder=3,
        )
        if curve.half_width is not None:
            low = np.clip(curve.accuracy - curve.half_width, *curve.bounds)[shown]
            high = np.clip(curve.accuracy + curve.half_width, *curve.bounds)[shown]
            axes.fill_between(x[shown], low, high, color=look.colour, alpha=alpha, linewidth=0, zorder=2)
    axes.margins(x=0.03)
    axes.grid(axis="y", color="0.9", linewidth=0.6)


def _wide(xs: Sequence[Floats]) -> bool:
    totals = [float(x[-1]) for x in xs]
    return min(totals) > 0 and max(totals) / min(totals) > WIDE_RANGE


def _marked(points: int, index: int, of: int) -> list[int]:
    """Points with a marker: some, evenly, and the last; staggered, so that curves which coincide show both."""
    step = max(1, math.ceil(points / MARKS))
    start = (index * step) // of
    return sorted({*range(start, points, step), *range(points - 1, points)})


def _caption(drawn: Sequence[Curve], confidence: float) -> str:
    counts = sorted({curve.seeds for curve in drawn})
    if counts == [1]:
        return "one seed"
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean over {seeds} seeds, band: {100 * confidence:g} % confidence interval"


def _legend(figure: Figure, axes: Axes, caption: str) -> None:
    """One legend below the panels, in the fewest rows that fit the width, the figure grown by its height."""
    lines, names = axes.get_legend_handles_labels()
    for rows in range(1, len(names) + 1):
        legend = figure.legend(
            lines,
            names,
            loc="outside lower center",
            ncols=math.ceil(len(names) / rows),
            title=caption,
            frameon=False,
            handlelength=3.2,
            columnspacing=1.6,
            borderaxespad=0.2,
        )
        box = legend.get_window_extent()
        if box.width <= 0.98 * figure.bbox.width or rows == len(names):
            break
        legend.remove()
    legend.get_title().set_fontsize(8)
    figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)


def _name_target(axes: Axes, target: float, *, beside: bool) -> None:
    """Name the line of the target right of its panel, or on it where names of curves stand there."""
    axes.annotate(
        f"target\n{100 * target:g} %" if beside else f"target {100 * target:g} %",
        xy=(1, 100 * target),
        xycoords=axes.get_yaxis_transform(),
        xytext=(3, 0) if beside else (-2, -2),
        textcoords="offset points",
        va="center" if beside else "top",
        ha="left" if beside else "right",
        fontsize=LABEL_SIZE,
        color="0.25",
        annotation_clip=False,
    )
