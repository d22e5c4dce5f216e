"""The barrier figure: loss and accuracy on the way from one model to another, before and after matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.errors import InvalidOption
from fedmerge.plotting.canvas import blank, picture_path, save
from fedmerge.plotting.changes import draw_changes
from fedmerge.plotting.style import styles

if TYPE_CHECKING:  # a picture needs what was found, not what finds it
    from matplotlib.axes import Axes

    from fedmerge.diagnostics import Barrier, MatchingCosts

__all__ = ["draw_accuracies", "draw_losses", "plot_barrier", "plot_matching"]

ENDS = "position on the line between the models"


def plot_barrier(lines: Mapping[str, Barrier], out: Path) -> Path:
    """Draw loss and accuracy along the line between two models, a curve for each way to bring them together.

    Parameters
    ----------
    lines
        By name, such as ``"as trained"`` and ``"matched"``, what :func:`fedmerge.diagnostics.barrier` found.
    out
        The file to write (.png, .pdf or .svg), or a folder, which then gets a `barrier.png`.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    InvalidOption
        There are no lines, or the kind of file is unknown.
    RecordError
        The file cannot be written, or matplotlib is missing.

    Examples
    --------
    >>> from fedmerge.diagnostics import Barrier
    >>> lines = {"as trained": Barrier((0.0, 0.5, 1.0), (0.1, 2.0, 0.1), (0.97, 0.4, 0.97))}
    >>> plot_barrier(lines, Path("barrier.png"))  # doctest: +SKIP
    PosixPath('barrier.png')
    """
    file = picture_path(out, "barrier.png")
    with blank(7.0, 2.9) as figure:
        losses, accuracies = figure.subplots(1, 2)
        draw_losses(losses, lines)
        draw_accuracies(accuracies, lines)
        return save(figure, file)


def plot_matching(lines: Mapping[str, Barrier], costs: MatchingCosts, out: Path) -> Path:
    """Draw the barrier figure and, beside it, how far each layer's weights are apart before and after matching.

    Parameters
    ----------
    lines, out
        As for :func:`plot_barrier`; a folder gets a `matching.png`.
    costs
        What :func:`fedmerge.diagnostics.matching_costs` found.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    InvalidOption, RecordError
        As :func:`plot_barrier`; there are no groups.

    Examples
    --------
    >>> from fedmerge.diagnostics import Barrier, MatchingCosts
    >>> lines = {"matched": Barrier((0.0, 0.5, 1.0), (0.1, 0.2, 0.1), (0.97, 0.95, 0.97))}
    >>> plot_matching(lines, MatchingCosts(("fc1",), (0.9,), (0.4,)), Path("matching.png"))  # doctest: +SKIP
    PosixPath('matching.png')
    """
    file = picture_path(out, "matching.png")
    height = max(2.9, 1.2 + 0.26 * len(costs.groups))
    with blank(10.0, height) as figure:
        losses, accuracies, layers = figure.subplots(1, 3)
        draw_losses(losses, lines)
        draw_accuracies(accuracies, lines)
        draw_changes(layers, costs.groups, costs.before, costs.after, "distance of weights (1: unrelated)")
        return save(figure, file)


def draw_losses(axes: Axes, lines: Mapping[str, Barrier]) -> None:
    """Loss along each line, the height of its barrier in the legend.

    Raises
    ------
    InvalidOption
        There are no lines.
    """
    if not lines:
        raise InvalidOption("there is no line to draw: pass at least one barrier")
    for name, line in lines.items():
        _curve(axes, name, lines, line.losses, f"{name}: barrier {line.height:.2g}")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    # Above the panel: curves with a hill leave no corner free, and flat ones lie where a legend would.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, handlelength=2.6, borderaxespad=0.2)


def draw_accuracies(axes: Axes, lines: Mapping[str, Barrier]) -> None:
    """Accuracy in percent along each line."""
    for name, line in lines.items():
        _curve(axes, name, lines, [100 * share for share in line.accuracies], name)
    axes.set_ylabel("accuracy (%)")


def _curve(axes: Axes, name: str, lines: Mapping[str, Barrier], values: Sequence[float], label: str) -> None:
    look = styles(lines)[name]
    axes.plot(
        lines[name].positions,
        values,
        color=look.colour,
        dashes=look.dashes or (None, None),
        marker=look.marker,
        markersize=4,
        markerfacecolor=look.colour if look.filled else "white",
        label=label,
    )
    axes.set_xlabel(ENDS)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], labels=["a", "", "½", "", "b"])
    axes.grid(axis="y", color="0.9", linewidth=0.6)
