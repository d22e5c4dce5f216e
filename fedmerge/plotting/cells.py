"""The cells of the partition figure: counts as dots, or as shades where there are too many for dots."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from fedmerge.plotting.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

__all__ = ["dot_areas", "draw_dots", "draw_heat", "key_counts"]

Floats = NDArray[np.float64]

WIDEST_DOT = 17.0  # points: cells may be wider, but then dots would fill the key


def draw_dots(figure: Figure, axes: Axes, counts: Floats) -> None:
    """Draw [clients, classes] counts as dots and a key of their sizes beside the figure."""
    axes.grid(color="0.93", linewidth=0.6)
    client, label = np.nonzero(counts)
    shown = counts[client, label]
    largest = max(float(counts.max()), 1.0)
    keys = key_counts(largest)
    dots = axes.scatter(client, label, color=INK, linewidths=0, zorder=3)
    legend = figure.legend(
        [axes.scatter([], [], color=INK, linewidths=0) for _ in keys],
        [f"{key:,}" for key in keys],
        loc="outside right upper",
        title="examples",
        frameon=False,
        title_fontsize=8,
        labelspacing=0.9,
    )
    figure.draw_without_rendering()  # the layout, with the key in it, decides how large a cell is
    cell = min(axes.bbox.width / counts.shape[0], axes.bbox.height / counts.shape[1]) * 72 / figure.dpi
    full = (0.92 * min(cell, WIDEST_DOT)) ** 2
    dots.set_sizes(dot_areas(shown, largest, full))
    for key, handle in zip(keys, legend.legend_handles, strict=True):
        cast("PathCollection", handle).set_sizes(dot_areas(np.array([float(key)]), largest, full))


def draw_heat(figure: Figure, axes: Axes, counts: Floats) -> None:
    """Draw [clients, classes] counts as shades of grey and a colour bar."""
    # White is none; the square root keeps small counts apart from none, as area does for dots.
    largest = max(float(counts.max()), 1.0)
    image = axes.imshow(
        np.sqrt(counts.T), aspect="auto", cmap="Greys", vmin=0, vmax=np.sqrt(largest), interpolation="nearest"
    )
    keys = [0, *key_counts(largest)]
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=20, fraction=0.03)
    bar.set_ticks([float(np.sqrt(key)) for key in keys], labels=[f"{key:,}" for key in keys])
    bar.set_label("examples")
    bar.outline.set_linewidth(0.5)


def dot_areas(counts: Floats, largest: float, full: float) -> Floats:
    """Areas (points squared) proportional to counts, `largest` having the area `full`; zero stays zero.

    A small count keeps half a square point: that a client holds a class at all should be seen.
    """
    areas: Floats = np.where(counts > 0, np.maximum(counts / largest * full, 0.5), 0.0)
    return areas


def key_counts(largest: float) -> list[int]:
    """Up to three round counts to label a scale with: one near `largest`, a quarter and a twentieth of it.

    Examples
    --------
    >>> key_counts(437.0)
    [20, 100, 400]
    """
    step = 10.0 ** np.floor(np.log10(max(largest, 1.0)))
    top = step * np.floor(max(largest, 1.0) / step)
    return sorted({max(1, round(float(top) / part)) for part in (20, 4, 1)})
