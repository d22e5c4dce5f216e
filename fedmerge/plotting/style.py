"""How each method looks: a line that can be told apart in colour, by colour-blind eyes, and in grey."""

from __future__ import annotations

import re
import zlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["INK", "Style", "styles"]

INK = "#1f3b63"  # dots, bars: anything that is not a method

# Eight steps of lightness (L* from 0 to 72, 6 or more apart), neighbours far apart; no pair looks alike with
# red-green blindness, none is too pale for a white page.
COLOURS = ("#000000", "#cc4411", "#ddaa33", "#332288", "#44aa99", "#882255", "#5588dd", "#11703a")
# Eight shapes, filled or hollow: sixteen markers that stay distinct at 5 points.
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<")
# Five patterns against eight colours: no pair comes twice among forty methods.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.6), (1.2, 1.4), (6, 1.5, 1.2, 1.5), (9, 2.5))

# One colour per method in every figure. Methods that are often drawn together have different ones; black is FedAvg's
# alone. A name that is not listed has the colour of its checksum.
_FAMILIES: tuple[tuple[str, ...], ...] = (
    ("fedavg",),
    ("fedfisher", "fedma", "cca", "median", "scaffold"),
    ("fedkfac", "zipit", "maecho"),
    ("fednova", "rebasin", "gradient_matching", "krum"),
    ("pfnm", "regmean", "geometric_median", "fedprox"),
    ("fisher", "c2m3", "median_norm_clipping", "fedadam"),
    ("fedatt", "otfusion", "mats", "trimmed_mean", "fedyogi", "feddyn"),
    ("fedlpa", "gamf", "norm_clipping", "fedavgm"),
)
_COLOUR_OF = {name: index for index, names in enumerate(_FAMILIES) for name in names}


Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Style:
    """Colour, marker, whether the marker is filled, and dash pattern (on, off, ... in line widths)."""

    colour: str
    marker: str
    filled: bool
    dashes: tuple[float, ...]


def styles(methods: Iterable[Name]) -> dict[Name, Style]:
    """A style per method, by its name alone; where several share a colour, markers and dashes tell them apart.

    A method keeps its colour under options, server steps and labels: these are variants of one method.

    Examples
    --------
    >>> looks = styles(["fedavg", "fednova", "fednova(server_momentum=0.5)"])
    >>> looks["fednova"].colour == styles(["fednova"])["fednova"].colour
    True
    >>> looks["fednova"].dashes == looks["fednova(server_momentum=0.5)"].dashes
    False
    """
    chosen: dict[Name, Style] = {}
    taken: dict[int, int] = {}
    for method in sorted(set(methods), key=str):
        index = _colour(str(method))
        chosen[method] = _style(index, taken.get(index, 0))
        taken[index] = taken.get(index, 0) + 1
    return chosen


def _colour(method: str) -> int:
    name = re.split(r"[(+ ]", method, maxsplit=1)[0]
    listed = _COLOUR_OF.get(name)
    return 1 + zlib.crc32(name.encode()) % (len(COLOURS) - 1) if listed is None else listed


def _style(index: int, variant: int) -> Style:
    """The look of the first, second, ... method with a colour; both shift, so that no two share marker and dashes."""
    turn = variant // len(MARKERS)  # the second turn through the shapes swaps filled and hollow
    return Style(
        colour=COLOURS[index],
        marker=MARKERS[(index + 3 * variant) % len(MARKERS)],
        filled=(index + variant + turn) % 2 == 0,
        dashes=DASHES[(index + variant) % len(DASHES)],
    )
