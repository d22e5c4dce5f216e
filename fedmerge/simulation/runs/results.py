"""Table and curves of a finished comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmerge.plotting import plot_convergence, plot_traffic, read_runs, summarise, summarise_references, write_summary
from fedmerge.plotting.runs import main_measure
from fedmerge.simulation.runs.config_model import Config

__all__ = ["choose_target", "write_results"]

# Accuracy above the initial model's that a target must have.
_LEARNT = 0.05


def write_results(config: Config, runs: list[Path], out: Path) -> tuple[list[dict[str, Any]], float | None, list[Path]]:
    """Write ``summary.csv``, ``convergence.png`` and ``traffic.png``.

    Without a target in the configuration it is 95 % of the best final accuracy, in whole percents, so that
    every comparison says how soon each method gets near the best one. Where that is hardly more than what the
    initial model has, nobody has learnt anything, and there is no target.

    Returns
    -------
    tuple
        The rows of the summary, the target used, the files.
    """
    target = choose_target(runs) if config.target is None else config.target
    rows = [*summarise(runs, target=target), *summarise_references(runs)]
    files = [write_summary(rows, out / "summary.csv"), plot_convergence(runs, out / "convergence.png", target=target)]
    return rows, target, [*files, plot_traffic(runs, out / "traffic.png")]


def choose_target(folders: Sequence[Path]) -> float | None:
    """95 % of the best final accuracy of a method, in whole percents; None where nobody has learnt anything.

    That is where it is hardly more than what an initial model has. Tasks without an accuracy have no target.
    """
    rows = summarise(folders, target=None)
    if main_measure(read_runs(folders)) == "test_loss":
        return None
    finals = [row["final_accuracy_mean"] for row in rows if row["diverged"] < row["seeds"]]
    starts = [run.rows[0]["test_accuracy"] or 0.0 for run in read_runs(folders)]
    likely = math.floor(95 * max((accuracy for accuracy in finals if accuracy), default=0.0)) / 100
    return likely if likely > max(starts) + _LEARNT else None
