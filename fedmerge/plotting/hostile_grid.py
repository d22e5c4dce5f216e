"""The figure of hostile clients: accuracy and attack success against the share of attackers, a curve per method."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from fedmerge.errors import RecordError
from fedmerge.plain_text import one_line
from fedmerge.plotting.canvas import blank, picture_path, save
from fedmerge.plotting.runs import CONFIG, Run, read_runs
from fedmerge.plotting.style import Style, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Outcome", "outcomes", "plot_hostile"]

MEASURES = {"test_accuracy": "test accuracy (%)", "attack_success": "attack success (%)"}


@dataclass(frozen=True)
class Outcome:
    """What a run under attack ended with; ``value`` is ``measure`` of its last round, in percent."""

    attack: str
    measure: str
    method: str
    share: float
    value: float


def outcomes(folders: Sequence[Path]) -> list[Outcome]:
    """The ends of all runs in these comparisons, each of which may have another attack or share of attackers.

    Raises
    ------
    RecordError
        As `read_runs`, for each folder; a run has no attack in its configuration.
    """
    results = []
    for folder in folders:
        for run in read_runs([folder]):
            attack, share = _attack(run)
            for measure in MEASURES:
                value = run.rows[-1].get(measure)
                if value is not None:
                    results.append(Outcome(attack, measure, run.method, share, 100 * value))
    return results


def plot_hostile(folders: Sequence[Path], out: Path) -> Path:
    """Draw the last round's accuracy, and success of attacks that aim at something, against the share of attackers.

    A panel for each attack and measure; a curve for each method, the mean over seeds, with a stroke from the lowest
    seed to the highest.

    Parameters
    ----------
    folders
        Comparison folders as `simulations/hostile.py` leaves them, one for each attack and share.
    out
        The file to write (.png, .pdf or .svg), or a folder, which then gets a `hostile.png`.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    RecordError, InvalidOption
        As :func:`outcomes` and :func:`~fedmerge.plotting.plot_convergence`.

    Examples
    --------
    >>> plot_hostile(sorted(Path("runs/hostile").iterdir()), Path("plots"))  # doctest: +SKIP
    PosixPath('plots/hostile.png')
    """
    file = picture_path(out, "hostile.png")
    drawn = outcomes(folders)
    if not drawn:
        raise RecordError("there is no run to draw: name comparisons with an attack, see simulations/hostile.py")
    aimed = {o.attack for o in drawn if o.measure == "attack_success"}  # these have two panels, side by side
    panels = sorted(
        {(o.attack, o.measure) for o in drawn},
        key=lambda panel: (panel[0] in aimed, panel[0], panel[1] == "attack_success"),
    )
    looks = styles(o.method for o in drawn)
    with blank(3.1 * len(panels) + 2.4, 3.3) as figure:
        for axes, (attack, measure) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            shown = [o for o in drawn if (o.attack, o.measure) == (attack, measure)]
            for method, look in looks.items():
                _curve(axes, method, look, [o for o in shown if o.method == method])
            axes.set_title(one_line(attack.replace("_", " ")))
            axes.set_xlabel("share of attackers (%)")
            axes.set_ylabel(MEASURES[measure])
            axes.set_ylim(-3, 103)
            axes.grid(axis="y", color="0.9", linewidth=0.6)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, handlelength=2.6)
        return save(figure, file)


def _curve(axes: Axes, method: str, look: Style, ends: Sequence[Outcome]) -> None:
    by_share: dict[float, list[float]] = {}
    for end in ends:
        by_share.setdefault(100 * end.share, []).append(end.value)
    shares = sorted(by_share)
    axes.plot(
        shares,
        [fmean(by_share[share]) for share in shares],
        color=look.colour,
        dashes=look.dashes or (None, None),
        marker=look.marker,
        markersize=5,
        markerfacecolor=look.colour if look.filled else "white",
        label=method,
        zorder=3,
    )
    for share in shares:
        if len(by_share[share]) > 1:
            axes.vlines(share, min(by_share[share]), max(by_share[share]), color=look.colour, linewidth=0.6, zorder=2)


def _attack(run: Run) -> tuple[str, float]:
    file = run.folder / CONFIG
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))["attack"]
        return str(settings["kind"]), float(settings["share"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{file} names no attack and share: draw runs that have an [attack]") from error
