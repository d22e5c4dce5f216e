"""The permutation figure: which neuron went where, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmerge.errors import InvalidOption
from fedmerge.plotting.canvas import blank, picture_path, save
from fedmerge.plotting.changes import short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from fedmerge.permutations import PermutationSpec

__all__ = ["cells", "plot_permutations"]

CELLS = 40  # a side of a heat map: more neurons share cells
COLUMNS = 4


def plot_permutations(spec: PermutationSpec, perms: Sequence[Tensor], out: Path) -> Path:
    """Draw each group's permutation as a heat map: neuron p[i], in the column, came to place i, the row.

    The diagonal means that nothing moved. Groups of more than 40 neurons share cells, a darker one holding more;
    groups within blocks are left out.

    Parameters
    ----------
    spec
        The symmetries.
    perms
        A permutation for each of its groups.
    out
        The file to write (.png, .pdf or .svg), or a folder, which then gets a `permutations.png`.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    InvalidOption
        There are no groups, another number of permutations, or the kind of file is unknown.
    RecordError
        The file cannot be written, or matplotlib is missing.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.permutations import trace
    >>> spec = trace(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)), torch.zeros(2, 4))
    >>> plot_permutations(spec, spec.random(), Path("permutations.png"))  # doctest: +SKIP
    PosixPath('permutations.png')
    """
    file = picture_path(out, "permutations.png")
    if len(perms) != len(spec.groups):
        raise InvalidOption(f"{len(perms)} permutations for {len(spec.groups)} groups: give one for each")
    within = {g for group in spec.groups for block in group.inner for g in block}
    shown = [(group.name, np.asarray(p)) for i, (group, p) in enumerate(zip(spec.groups, perms, strict=True))
             if i not in within]  # fmt: skip
    if not shown:
        raise InvalidOption("there is no group of neurons to draw")
    columns = min(COLUMNS, len(shown))
    lines = math.ceil(len(shown) / columns)
    with blank(2.1 * columns + 0.4, 2.4 * lines) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, (name, perm) in zip(panels, shown, strict=False):
            _heat(axes, name, perm)
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        return save(figure, file)


def _heat(axes: Axes, name: str, perm: NDArray[np.int64]) -> None:
    size, stay = len(perm), int((perm == np.arange(len(perm))).sum())
    axes.imshow(cells(perm), cmap="Greys", vmin=0, extent=(0, size, size, 0), interpolation="nearest")
    axes.set_title(f"{short_name(name)}\n{size} neurons, {stay} stay", fontsize=8)
    axes.set_xticks([0, size])
    axes.set_yticks([0, size])
    axes.spines[["top", "right"]].set_visible(True)


def cells(perm: NDArray[np.int64]) -> NDArray[np.float64]:
    """The permutation matrix, at most 40 cells a side, as numbers of neurons in each cell.

    Examples
    --------
    >>> cells(np.array([1, 0]))
    array([[0., 1.],
           [1., 0.]])
    """
    side = min(len(perm), CELLS)
    grid = np.zeros((side, side))
    np.add.at(grid, (np.arange(len(perm)) * side // len(perm), perm * side // len(perm)), 1)
    return grid
