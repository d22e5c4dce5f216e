"""The partition figure: which client holds how much of which class."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmerge.errors import InvalidOption
from fedmerge.plain_text import one_line
from fedmerge.plotting.canvas import blank, picture_path, save
from fedmerge.plotting.cells import draw_dots, draw_heat
from fedmerge.plotting.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_partition", "plot_partition"]

Floats = NDArray[np.float64]

MOST_DOTS = 40  # clients or classes; beyond it dots get too small to compare and a heat map takes over
BARS_HEIGHT = 0.9  # inches
KEY_WIDTH = 0.9  # inches
LONGEST_NAME = 60  # characters
CHARACTER = 0.068  # inches, of a name
NARROW = 3  # characters of a client's name that fit under its column


def plot_partition(
    counts: NDArray[np.generic],
    out: Path,
    *,
    class_names: Sequence[str] = (),
    client_names: Sequence[str] = (),
    title: str = "",
) -> Path:
    """Draw who holds which labels, a column per client, with each client's size as a bar above it.

    Up to 40 clients and classes are drawn as dots with an area proportional to the count, more as a heat map
    (where a darker cell holds more). Data without labels, a single column of sizes, is drawn as bars alone.

    Parameters
    ----------
    counts
        Examples, of shape [clients, classes]; [clients, 1] for data without labels.
    out
        The file to write (.png, .pdf or .svg), or a folder, which then gets a `partition.png`.
    class_names, client_names
        Names for the two axes; numbers from 0 where none are given, or more than 40.
    title
        A line above the figure.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    InvalidOption
        `counts` is no table of numbers from 0, a list of names has another length, or the kind of file
        is unknown.
    RecordError
        The file cannot be written, or matplotlib is missing.

    Examples
    --------
    >>> counts = np.array([[120, 3], [0, 80], [40, 41]])
    >>> plot_partition(counts, Path("partition.png"), class_names=["cat", "dog"])  # doctest: +SKIP
    PosixPath('partition.png')
    """
    table = _checked(counts, class_names, client_names)
    file = picture_path(out, "partition.png")
    class_names, client_names = _shown(class_names), _shown(client_names)
    with blank(*_inches(table, class_names, client_names)) as figure:
        draw_partition(figure, table, class_names=class_names, client_names=client_names, title=title)
        return save(figure, file)


def _shown(names: Sequence[str]) -> list[str]:
    """Names as a data set has them, which may be anything, as an axis can show them."""
    return [one_line(str(name), LONGEST_NAME) for name in names]


def draw_partition(
    figure: Figure,
    counts: Floats,
    *,
    class_names: Sequence[str] = (),
    client_names: Sequence[str] = (),
    title: str = "",
) -> None:
    """Fill a blank figure: bars of sizes on top, the classes of each client below."""
    clients, classes = counts.shape
    if classes == 1:
        bars = bottom = figure.subplots()
    else:
        height = figure.get_figheight()
        ratios = [BARS_HEIGHT, height - BARS_HEIGHT - 0.6]
        bars, bottom = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
        _name_classes(bottom, classes, class_names)
    bottom.set_xlim(-0.5, clients - 0.5)
    _name_clients(bottom, clients, client_names)
    _sizes(bars, counts.sum(axis=1), ticks=bars is bottom)
    if title:
        bars.set_title(_in_lines(title, figure, bars))
    if classes > 1:
        (draw_dots if max(clients, classes) <= MOST_DOTS else draw_heat)(figure, bottom, counts)


def _in_lines(title: str, figure: Figure, axes: Axes) -> str:
    """The title, broken where it would run out of the axes and over the key, which is still to come."""
    figure.draw_without_rendering()
    width = axes.bbox.width / figure.dpi - KEY_WIDTH
    return textwrap.fill(title, max(20, int(width / CHARACTER)))


def _checked(counts: NDArray[np.generic], class_names: Sequence[str], client_names: Sequence[str]) -> Floats:
    try:
        table = np.asarray(counts, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"counts must be numbers of shape [clients, classes]: {error}.") from error
    if table.ndim != 2 or 0 in table.shape:
        raise InvalidOption(f"counts must have the shape [clients, classes], not {list(table.shape)}.")
    if not np.isfinite(table).all() or (table < 0).any():
        raise InvalidOption("counts must be numbers from 0: there is a negative or missing one.")
    for name, names, length in (
        ("client_names", client_names, table.shape[0]),
        ("class_names", class_names, table.shape[1]),
    ):
        if len(names) not in (0, length):
            raise InvalidOption(f"{name} has {len(names)} entries for {length}. Give one each, or none.")
    return table


def _inches(counts: Floats, class_names: Sequence[str], client_names: Sequence[str]) -> tuple[float, float]:
    """Square cells where they fit a page, narrower ones beyond; names get their room on top of that."""
    clients, classes = counts.shape
    cell = 0.24 if max(clients, classes) <= MOST_DOTS else 0.18
    width = min(max(clients * 0.24 + 2.0, 4.5), 10.0)
    body = 1.0 if classes == 1 else min(max(classes * cell, 0.7), 6.5)
    beside = max((len(str(name)) for name in class_names), default=0) if 1 < classes <= MOST_DOTS else 0
    below = max((len(str(name)) for name in client_names), default=0) if clients <= MOST_DOTS else 0
    return width + CHARACTER * beside, BARS_HEIGHT + body + 0.75 + (CHARACTER * below if below > NARROW else 0)


def _sizes(axes: Axes, sizes: Floats, *, ticks: bool) -> None:
    axes.bar(np.arange(len(sizes)), sizes, width=0.75 if len(sizes) <= MOST_DOTS else 1.0, color=INK, linewidth=0)
    axes.set_ylabel("examples")
    axes.locator_params(axis="y", nbins=3 if not ticks else 5, integer=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(axis="x", length=0, labelbottom=ticks)
    axes.grid(axis="y", color="0.9", linewidth=0.6)


def _name_clients(axes: Axes, clients: int, names: Sequence[str]) -> None:
    axes.set_xlabel("client")
    if names and clients <= MOST_DOTS:
        upright = max(len(str(name)) for name in names) > NARROW
        axes.set_xticks(range(clients), labels=[str(name) for name in names], rotation=90 if upright else 0)
    elif clients <= MOST_DOTS:
        axes.set_xticks(range(clients))
    else:
        axes.locator_params(axis="x", integer=True, nbins=12)
    axes.tick_params(axis="x", length=2)


def _name_classes(axes: Axes, classes: int, names: Sequence[str]) -> None:
    axes.set_ylim(classes - 0.5, -0.5)  # class 0 on top, as in a table
    axes.set_ylabel("class")
    if classes <= MOST_DOTS:
        axes.set_yticks(range(classes), labels=[str(name) for name in names] if names else None)
    else:
        axes.locator_params(axis="y", integer=True, nbins=10)
    axes.tick_params(axis="y", length=2)
