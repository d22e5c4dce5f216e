"""What matching changes in each layer: rows of dots, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from fedmerge.errors import InvalidOption
from fedmerge.plotting.canvas import blank, picture_path, save
from fedmerge.plotting.style import INK

if TYPE_CHECKING:  # a picture needs what was found, not what finds it
    from matplotlib.axes import Axes

    from fedmerge.diagnostics import MatchingCosts, Similarity

__all__ = ["draw_changes", "plot_costs", "plot_similarity", "short_name"]

ROW = 0.26  # inches, of a layer
LONGEST = 34  # characters of a layer's name that fit beside a panel


def plot_costs(costs: MatchingCosts, out: Path) -> Path:
    """Draw how far the weights of each layer are apart, before and after matching.

    Parameters
    ----------
    costs
        What :func:`fedmerge.diagnostics.matching_costs` found.
    out
        The file to write (.png, .pdf or .svg), or a folder, which then gets a `matching-costs.png`.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    InvalidOption
        There are no groups, or the kind of file is unknown.
    RecordError
        The file cannot be written, or matplotlib is missing.

    Examples
    --------
    >>> from fedmerge.diagnostics import MatchingCosts
    >>> plot_costs(MatchingCosts(("fc1",), (0.9,), (0.4,)), Path("costs.png"))  # doctest: +SKIP
    PosixPath('costs.png')
    """
    file = picture_path(out, "matching-costs.png")
    with blank(5.0, 1.2 + ROW * len(costs.groups)) as figure:
        draw_changes(figure.subplots(), costs.groups, costs.before, costs.after, "distance of weights (1: unrelated)")
        return save(figure, file)


def plot_similarity(before: Similarity, after: Similarity, out: Path, *, pair: tuple[int, int] = (0, 1)) -> Path:
    """Draw CKA, and the correlation of neurons in the same place, of two models before and after.

    CKA does not see the order of neurons, so re-ordering leaves it as it is: it shows what training or merging
    changes, such as a merged model against its parents. Correlation is what matching raises.

    Parameters
    ----------
    before, after
        What :func:`fedmerge.diagnostics.similarity` found, for the same groups.
    out
        The file to write (.png, .pdf or .svg), or a folder, which then gets a `similarity.png`.
    pair
        Numbers of the two models.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    InvalidOption
        The groups differ, a number is out of range, or the kind of file is unknown.
    RecordError
        The file cannot be written, or matplotlib is missing.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.diagnostics import Similarity
    >>> found = Similarity(("fc1",), torch.ones(1, 2, 2), torch.ones(1, 2, 2))
    >>> plot_similarity(found, found, Path("similarity.png"))  # doctest: +SKIP
    PosixPath('similarity.png')
    """
    file = picture_path(out, "similarity.png")
    if before.groups != after.groups:
        raise InvalidOption(f"before and after are about different groups: {before.groups} and {after.groups}")
    if not all(0 <= number < len(similarity.cka[0]) for number in pair for similarity in (before, after)):
        raise InvalidOption(f"pair must name two of the models by number from 0, got {pair}")
    first, other = pair
    with blank(7.0, 1.2 + ROW * len(before.groups)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        draw_changes(left, before.groups, before.cka[:, first, other], after.cka[:, first, other], "linear CKA")
        draw_changes(
            right,
            before.groups,
            before.correlation[:, first, other],
            after.correlation[:, first, other],
            "correlation, neuron by neuron",
            legend=False,
        )
        return save(figure, file)


def draw_changes(
    axes: Axes, names: Sequence[str], before: ArrayLike, after: ArrayLike, label: str, *, legend: bool = True
) -> None:
    """A row for each layer, from the input down: a hollow dot before, a filled one after, a line between.

    Raises
    ------
    InvalidOption
        There are no layers.
    """
    if not names:
        raise InvalidOption("there is no group of neurons to draw")
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    rows = np.arange(len(names))
    axes.hlines(rows, old, new, color="0.6", linewidth=1.0, zorder=2)
    axes.scatter(old, rows, s=26, facecolors="white", edgecolors=INK, linewidths=1.1, zorder=3, label="before")
    axes.scatter(new, rows, s=26, color=INK, linewidths=1.1, zorder=4, label="after")
    axes.set_yticks(rows, labels=[short_name(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    values = np.concatenate([old, new])
    low, high = float(np.nanmin(values, initial=0)), float(np.nanmax(values, initial=1))
    axes.set_xlim(low - 0.08 if low < 0 else 0, 1.08 * high)  # room for half a dot beside the axis
    axes.set_xlabel(label)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    if legend:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, borderaxespad=0.2)


def short_name(name: str) -> str:
    """A name, its beginning left out where it is long: the end tells layers apart.

    Examples
    --------
    >>> short_name("model.encoder.blocks.11.attention.output.weight")
    '…blocks.11.attention.output.weight'
    """
    return name if len(name) <= LONGEST else f"…{name[-LONGEST + 1 :]}"
