"""How each method looks: a line that can be told apart in colour, by colour-blind eyes, and in grey."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["INK", "Style", "styles"]

INK = "#1f3b63"  # dots, bars: anything that is not a method

# Eight steps of lightness (L* from 0 to 72, 6 or more apart), neighbours far apart; no pair looks alike with
# red-green blindness, none is too pale for a white page.
COLOURS = ("#000000", "#cc4411", "#ddaa33", "#332288", "#44aa99", "#882255", "#5588dd", "#11703a")
# Eight shapes, filled or hollow: sixteen markers that stay distinct at 5 points.
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<")
# Five patterns against eight colours: no pair comes twice among forty methods.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.6), (1.2, 1.4), (6, 1.5, 1.2, 1.5), (9, 2.5))


@dataclass(frozen=True)
class Style:
    """Colour, marker, whether the marker is filled, and dash pattern (on, off, ... in line widths)."""

    colour: str
    marker: str
    filled: bool
    dashes: tuple[float, ...]


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """A style per method; it depends on which methods there are, not on their order.

    Examples
    --------
    >>> styles(["fedavg", "fednova"]) == styles(["fednova", "fedavg"])
    True
    """
    return {method: _style(index) for index, method in enumerate(sorted(set(methods)))}


def _style(index: int) -> Style:
    turn = index // len(MARKERS)  # the second turn through the shapes swaps filled and hollow
    return Style(
        colour=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        filled=(index + turn) % 2 == 0,
        dashes=DASHES[index % len(DASHES)],
    )
