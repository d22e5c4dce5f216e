"""The traffic figure: what accuracy the bytes that a client sends buy, a mark per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from fedmerge.plotting.canvas import blank, log_axis, page_width, picture_path, save
from fedmerge.plotting.curve_labels import LABEL_SIZE, wrapped
from fedmerge.plotting.curves import Curve, Floats, curves, spans_decades, uploads
from fedmerge.plotting.reference_lines import references
from fedmerge.plotting.runs import Run, by_method, read_runs
from fedmerge.plotting.style import styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_traffic"]

_WIDE = 60  # characters of a name in one line of the legend


def plot_traffic(
    folders: Sequence[Path], out: Path, *, labels: Sequence[str] | None = None, columns: int | None = None
) -> Path:
    """Draw test accuracy against the megabytes that clients have sent, statistics included.

    Each method is a curve over its rounds, the mean over seeds, with a stroke for each seed at the last round:
    few seeds say more than an interval estimated from them. Dashed lines are references: the ensemble of the
    first round's client models and the best of them. The legend says so.

    Parameters
    ----------
    folders
        Run folders or comparison folders, as for `read_runs`.
    out
        The file to write (.png, .pdf or .svg), or a folder, which then gets a `traffic.png`.
    labels
        One for each folder, to draw comparisons with the same methods together.
    columns
        For print: as wide as one column (3.4 inches, the names below) or two (7 inches).

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    RecordError, InvalidOption
        As `plot_convergence`.

    Examples
    --------
    >>> plot_traffic([Path("runs/one-shot")], Path("runs/one-shot"))  # doctest: +SKIP
    PosixPath('runs/one-shot/traffic.png')
    """
    file = picture_path(out, "traffic.png")
    runs = read_runs(folders, labels)
    drawn = curves(runs)
    width = 6.4 if columns is None else page_width(columns)
    with blank(width, 3.9 if columns is None else 2.6 if columns == 1 else 3.4) as figure:
        axes = figure.subplots()
        _marks(axes, drawn, uploads(runs, drawn), _ends(runs, drawn))
        _lines(axes, references(runs), 1 if drawn[0].measure == "test_loss" else 100)
        axes.set_xlabel(
            "megabytes sent by clients" if columns == 1 else "megabytes that all clients sent (models + statistics)"
        )
        axes.set_ylabel(drawn[0].axis)
        if spans_decades(drawn):
            log_axis(axes.yaxis)
            axes.set_ylabel(f"{drawn[0].axis}, log scale")
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        _legend(figure, _caption(runs, drawn), below=columns == 1)
        return save(figure, file)


def _caption(runs: Sequence[Run], drawn: Sequence[Curve]) -> str:
    """What a curve, a stroke and a dashed line are."""
    counts = sorted({curve.seeds for curve in drawn})
    if counts == [1]:
        lines = ["one seed"]
    else:
        seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        lines = [f"mean over {seeds} seeds;", "strokes: each seed at the end"]
    return "\n".join([*lines, *(["dashed: the clients' own models"] if references(runs) else [])])


def _legend(figure: Figure, caption: str, *, below: bool) -> None:
    where = {"loc": "outside lower center", "ncols": 2} if below else {"loc": "outside right center"}
    if below:
        figure.set_figheight(figure.get_figheight() + 0.9)
    legend = figure.legend(**where, frameon=False, handlelength=2.6, title=caption, alignment="left")
    legend.get_title().set_fontsize(LABEL_SIZE)


def _ends(runs: Sequence[Run], drawn: Sequence[Curve]) -> dict[str, list[float]]:
    """Accuracy in percent, or loss, of each seed at the last round of each curve."""
    return {
        curve.method: [
            row[curve.measure] * (1 if curve.measure == "test_loss" else 100)
            for run in by_method(runs)[curve.method]
            for row in run.rows
            if row["round"] == curve.rounds[-1]
        ]
        for curve in drawn
    }


def _marks(axes: Axes, drawn: Sequence[Curve], sent: Mapping[str, Floats], ends: Mapping[str, Sequence[float]]) -> None:
    looks = styles(curve.method for curve in drawn)
    for curve in drawn:
        look, shown = looks[curve.method], curve.rounds > 0
        x, y = sent[curve.method][shown], curve.accuracy[shown]
        if not len(x):
            continue
        axes.plot(
            x,
            y,
            color=look.colour,
            dashes=look.dashes or (None, None),
            marker=look.marker,
            markersize=5.5,
            markerfacecolor=look.colour if look.filled else "white",
            label=curve.method if len(curve.method) <= _WIDE else wrapped(curve.method),
            zorder=3,
        )
        if len(ends[curve.method]) > 1:
            own = [x[-1]] * len(ends[curve.method])
            axes.plot(own, ends[curve.method], color=look.colour, linewidth=0.6, marker="_", markersize=6, zorder=2)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)


def _lines(axes: Axes, columns: Mapping[str, Sequence[float]], unit: int) -> None:
    for name, accuracies in columns.items():
        height = unit * fmean(accuracies)  # or losses
        axes.axhline(height, color="0.35", linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        axes.annotate(
            f"{name} {height:.1f} %" if unit == 100 else f"{name} {height:.3g}",
            xy=(0.99, height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=LABEL_SIZE,
            color="0.25",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
        )
