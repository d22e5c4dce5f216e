"""The table of a comparison: one row per method, from run records. Needs no matplotlib."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedmerge.errors import InvalidOption
from fedmerge.plain_text import one_line
from fedmerge.plotting.picture_files import replacing
from fedmerge.plotting.reference_lines import references
from fedmerge.plotting.runs import Run, by_method, extra_metrics, main_measure, read_runs

__all__ = ["check_target", "summarise", "summarise_references", "write_summary"]

MEGABYTE = 1e6
COLUMNS = (
    "method",
    "seeds",
    "final_accuracy_mean",
    "final_accuracy_std",
    "best_accuracy_mean",
    "best_accuracy_std",
    "rounds_to_target",
    "reached",
    "megabytes_up",
    "megabytes_down",
    "seconds",
    "seconds_merge",
    "parameters",
    "clients_failed",
    "rounds",
    "diverged",
    "stopped",
    "final_loss_mean",
    "final_loss_std",
    "best_loss_mean",
)


def summarise(folders: Sequence[Path], *, target: float | None) -> list[dict[str, Any]]:
    """Summarise each method over its seeds.

    Parameters
    ----------
    folders
        Run folders or comparison folders, as for `read_runs`.
    target
        A test accuracy in (0, 1] to reach, or None.

    Returns
    -------
    list of dict
        Best final accuracy first, or lowest final loss where there is no accuracy (equal ones in order of
        appearance), with the keys

        - `method`, `seeds` (how many), `rounds` (of a run; a mean where they differ)
        - `final_accuracy_mean`, `final_accuracy_std`: of the last evaluated round; the sample standard
          deviation is None for one seed
        - `best_accuracy_mean`, `best_accuracy_std`: of each seed's best round
        - `rounds_to_target`: mean over the seeds that reached the target, None where none did;
          `reached`: how many did, None without a target; `diverged`: how many ended with a loss that is no
          number, which never count as having reached it
        - `megabytes_up`, `megabytes_down`: totals of a run, mean over seeds (MB = 10^6 bytes)
        - `seconds`: training + merging + evaluating; `seconds_merge`: merging alone; totals, mean over seeds
        - `parameters`: of the last model (a mean where methods grow a different width with each seed)
        - `clients_failed`: sum over rounds and seeds
        - `stopped`: after which round an observer has ended which seed's run, and why; None where none did
        - `final_loss_mean`, `final_loss_std`, `best_loss_mean`: as for the accuracy; the best is the lowest
        - `final_<metric>_mean`, `final_<metric>_std` for each further metric of the task

    Raises
    ------
    RecordError
        As `read_runs`.
    InvalidOption
        `target` is not in (0, 1].

    Examples
    --------
    >>> rows = summarise([Path("runs/digits")], target=0.9)  # doctest: +SKIP
    >>> rows[0]["method"], rows[0]["rounds_to_target"]  # doctest: +SKIP
    ('fednova', 12.5)
    """
    check_target(target)
    runs = read_runs(folders)
    measure, metrics = main_measure(runs), extra_metrics(runs)
    rows = [_row(method, group, target, measure, metrics) for method, group in by_method(runs).items()]
    if measure == "test_loss":
        return sorted(rows, key=lambda row: float("inf") if row["final_loss_mean"] is None else row["final_loss_mean"])
    return sorted(rows, key=lambda row: _descending(row["final_accuracy_mean"]))


def summarise_references(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What the clients' own models reached, in rows with the keys of `summarise`, None but for accuracy or loss.

    A comparison has such rows where its configuration set ``references``; names stand in parentheses, for
    they are no methods.

    Raises
    ------
    RecordError
        As `read_runs`.
    """
    runs = read_runs(folders)
    kind = main_measure(runs).removeprefix("test_")
    columns = [*COLUMNS, *(f"final_{name}_{part}" for name in extra_metrics(runs) for part in ("mean", "std"))]
    return [
        dict.fromkeys(columns)
        | {"method": f"({name})", "seeds": len(values)}
        | dict(zip((f"final_{kind}_mean", f"final_{kind}_std"), _mean_and_std(values), strict=True))
        for name, values in references(runs).items()
    ]


def write_summary(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write the rows of `summarise` as CSV (None as an empty cell) and return `path`.

    Raises
    ------
    RecordError
        The file cannot be written.

    Examples
    --------
    >>> write_summary(summarise([Path("runs/digits")], target=None), Path("summary.csv"))  # doctest: +SKIP
    """
    path = Path(path)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        metrics = (key for row in rows for key in row if key.startswith("final_"))
        columns = dict.fromkeys([*COLUMNS, *metrics])
        writer = csv.DictWriter(file, fieldnames=list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def check_target(target: float | None) -> None:
    """Refuse a target accuracy outside (0, 1]: 90 is a likely slip for 0.9."""
    if target is not None and not 0 < target <= 1:
        raise InvalidOption(f"target is an accuracy in (0, 1], not {target}. For 90 % write 0.9.")


def _row(
    method: str, runs: Sequence[Run], target: float | None, measure: str, metrics: Sequence[str]
) -> dict[str, Any]:
    evaluated = [_evaluated(run) for run in runs]
    final = [accuracies[-1][1] for accuracies in evaluated if accuracies]
    best = [max(accuracy for _, accuracy in accuracies) for accuracies in evaluated if accuracies]
    diverged = [_diverged(run, measure) for run in runs]
    losses = [found for run in runs if (found := _evaluated(run, "test_loss"))]
    judged = [accuracies for accuracies, lost in zip(evaluated, diverged, strict=True) if not lost]
    reached = [] if target is None else _rounds_to(target, judged)
    values = (
        method,
        len(runs),
        *_mean_and_std(final),
        *_mean_and_std(best),
        fmean(reached) if reached else None,
        None if target is None else len(reached),
        fmean(_total(run, "bytes_up") / MEGABYTE for run in runs),
        fmean(_total(run, "bytes_down") / MEGABYTE for run in runs),
        fmean(_total(run, "seconds_train", "seconds_merge", "seconds_evaluate") for run in runs),
        fmean(_total(run, "seconds_merge") for run in runs),
        _whole(fmean(run.rows[-1]["parameters"] for run in runs)),
        sum(row["clients_failed"] for run in runs for row in run.rows),
        _whole(fmean(run.rows[-1]["round"] for run in runs)),
        sum(diverged),
        "; ".join(filter(None, map(_stopped, runs))) or None,
        *_mean_and_std([one[-1][1] for one in losses]),
        _mean_and_std([min(loss for _, loss in one) for one in losses])[0],
    )
    row = dict(zip(COLUMNS, values, strict=True))
    for name in metrics:
        last = [found[-1][1] for run in runs if (found := _evaluated(run, f"test_{name}"))]
        row |= dict(zip((f"final_{name}_mean", f"final_{name}_std"), _mean_and_std(last), strict=True))
    return row


def _evaluated(run: Run, key: str = "test_accuracy") -> list[tuple[int, float]]:
    """Round and accuracy, or another measure, of the rounds that were evaluated."""
    pairs = [(row["round"], row.get(key)) for row in run.rows]
    return [(number, value) for number, value in pairs if value is not None and math.isfinite(value)]


def _diverged(run: Run, measure: str) -> bool:
    """Whether the last model was evaluated, and its loss is no number."""
    last = run.rows[-1]
    judged = measure == "test_loss" or last["test_accuracy"] is not None
    return judged and (last["test_loss"] is None or not math.isfinite(last["test_loss"]))


def _stopped(run: Run) -> str | None:
    """Why a run has no more rounds, where an observer wanted none."""
    last = run.rows[-1]
    reason = last.get("stopped")
    return None if reason is None else one_line(f"seed {run.seed} after round {last['round']}: {reason}")


def _rounds_to(target: float, evaluated: Sequence[Sequence[tuple[int, float]]]) -> list[int]:
    """The first round at or above the target, of each seed that got there."""
    hits = [[number for number, accuracy in one if accuracy >= target] for one in evaluated]
    return [rounds[0] for rounds in hits if rounds]


def _total(run: Run, *keys: str) -> float:
    return float(sum(row[key] for row in run.rows for key in keys))


def _mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    mean = fmean(values) if values else None
    return mean, stdev(values) if len(values) > 1 else None


def _whole(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _descending(accuracy: float | None) -> float:
    """A sort key: high accuracies first, methods that were never evaluated last."""
    return float("inf") if accuracy is None else -accuracy
