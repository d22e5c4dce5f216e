"""A blank figure and how it reaches the disk: the only place that loads matplotlib."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.errors import InvalidOption, RecordError
from fedmerge.plotting.picture_files import replacing

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["blank", "log_axis", "page_grid", "page_width", "picture_path", "save"]

SETTINGS = {
    "font.size": 8.5,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "fedmerge",
    "text.parse_math": False,  # names of methods, classes and clients are no formulas, nor mistakes in one
}
# Per format, the entries that name a date or a program version: without them, same records give same bytes.
NO_STAMP = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
DPI = 200
PAGE = {1: 3.4, 2: 7.0}  # inches, as in most journals


@contextmanager
def blank(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many inches; draw and save it within the block, where our settings hold.

    It belongs to no pyplot state: it needs no display, and nothing of it outlives the block.

    Raises
    ------
    RecordError
        matplotlib is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise RecordError('figures need matplotlib: pip install "fedmerge[sim]"') from error
    with matplotlib.rc_context(SETTINGS):
        yield figures.Figure(figsize=(width, height), layout="constrained")


def log_axis(axis: Axis) -> None:
    """Make an axis logarithmic, its numbers written plainly: matplotlib's own are formulas, which are off here.

    Every power of ten is named; twice and five times as much too, where the axis spans less than two of them.
    """
    scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale  # type: ignore[attr-defined]
    scale("log")

    def between(value: float, _: float = 0) -> str:
        low, high = sorted(axis.get_view_interval())
        leading = round(value / 10 ** math.floor(math.log10(value))) if value > 0 else 0
        return f"{value:g}" if high < 100 * low and leading in (2, 5) else ""

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(between)


def page_width(columns: int) -> float:
    """Inches of one column of a printed page, or of two.

    Raises
    ------
    InvalidOption
        Another number of columns.
    """
    if columns not in PAGE:
        raise InvalidOption(f"a figure is as wide as 1 column or 2, not {columns!r}")
    return PAGE[columns]


def page_grid(panels: int, columns: int | None) -> tuple[int, int]:
    """Rows and columns of panels: beside each other on the screen, two to a row over two columns of print.

    Examples
    --------
    >>> page_grid(4, None), page_grid(4, 2), page_grid(3, 2), page_grid(2, 1)
    ((1, 4), (2, 2), (1, 3), (2, 1))
    """
    if columns == 1:
        return panels, 1
    if columns == 2 and panels % 2 == 0:
        return panels // 2, 2
    return 1, panels


def picture_path(out: Path, name: str) -> Path:
    """The file that `out` stands for: itself, or `name` in it where it is a folder.

    Raises
    ------
    InvalidOption
        The file is not a .png, .pdf or .svg.
    """
    out = Path(out)
    file = out / name if out.is_dir() else out
    if file.suffix.lower() not in NO_STAMP:
        raise InvalidOption(
            f"cannot draw to {file}: name a folder that exists, or a file that ends in {', '.join(NO_STAMP)}."
        )
    return file


def save(figure: Figure, path: Path) -> Path:
    """Write the figure in one step, without a time stamp, and return `path`."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI, metadata=NO_STAMP[path.suffix.lower()])
    return path
