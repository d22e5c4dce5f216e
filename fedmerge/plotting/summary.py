"""The table of a comparison: one row per method, from run records. Needs no matplotlib."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedmerge.errors import InvalidOption
from fedmerge.plain_text import one_line
from fedmerge.plotting.picture_files import replacing
from fedmerge.plotting.reference_lines import references
from fedmerge.plotting.runs import Run, extra_metrics, main_measure, read_runs

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
    table = pd.DataFrame([_figures(run, target, measure, metrics) for run in runs])
    rows = [_row(group, target, metrics) for _, group in table.groupby("method", sort=False)]
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
        | _mean_and_std(f"final_{kind}", pd.Series(values, dtype=float))
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


def _figures(run: Run, target: float | None, measure: str, metrics: Sequence[str]) -> dict[str, Any]:
    """What one run has reached and cost; NaN where nothing was measured."""
    rows = pd.DataFrame(run.rows).set_index("round")
    accuracies, losses = _evaluated(rows, "test_accuracy"), _evaluated(rows, "test_loss")
    diverged = _diverged(run, measure)
    reached = accuracies.index[accuracies >= target] if target is not None and not diverged else []
    totals = rows[[*_COUNTED, *_SECONDS]].sum()
    return {
        "method": run.method,
        "final_accuracy": _last(accuracies),
        "best_accuracy": accuracies.max(),
        "rounds_to_target": reached[0] if len(reached) else float("nan"),
        "megabytes_up": totals["bytes_up"] / MEGABYTE,
        "megabytes_down": totals["bytes_down"] / MEGABYTE,
        "seconds": totals[_SECONDS].sum(),
        "seconds_merge": totals["seconds_merge"],
        "parameters": rows["parameters"].iloc[-1],
        "clients_failed": totals["clients_failed"],
        "rounds": rows.index[-1],
        "diverged": diverged,
        "stopped": _stopped(run),
        "final_loss": _last(losses),
        "best_loss": losses.min(),
        **{f"final_{name}": _last(_evaluated(rows, f"test_{name}")) for name in metrics},
    }


_SECONDS = ["seconds_train", "seconds_merge", "seconds_evaluate"]
_COUNTED = ["bytes_up", "bytes_down", "clients_failed"]


def _row(runs: pd.DataFrame, target: float | None, metrics: Sequence[str]) -> dict[str, Any]:
    """The figures of one method's runs together."""
    means = runs.mean(numeric_only=True)
    values = {
        "method": runs["method"].iloc[0],
        "seeds": len(runs),
        **_mean_and_std("final_accuracy", runs["final_accuracy"]),
        **_mean_and_std("best_accuracy", runs["best_accuracy"]),
        "rounds_to_target": _number(means["rounds_to_target"]),
        "reached": None if target is None else int(runs["rounds_to_target"].count()),
        **{name: float(means[name]) for name in ("megabytes_up", "megabytes_down", "seconds", "seconds_merge")},
        "parameters": _whole(float(means["parameters"])),
        "clients_failed": int(runs["clients_failed"].sum()),
        "rounds": _whole(float(means["rounds"])),
        "diverged": int(runs["diverged"].sum()),
        "stopped": "; ".join(runs["stopped"].dropna()) or None,
        **_mean_and_std("final_loss", runs["final_loss"]),
        "best_loss_mean": _number(means["best_loss"]),
    }
    for name in metrics:
        values |= _mean_and_std(f"final_{name}", runs[f"final_{name}"])
    return values


def _evaluated(rows: pd.DataFrame, key: str) -> pd.Series:
    """Accuracies, or another measure, by round, of the rounds that were evaluated to a finite number."""
    if key not in rows:
        return pd.Series(dtype=float)
    values = rows[key].astype(float)
    return values[values.abs() < float("inf")]


def _last(values: pd.Series) -> float:
    return float(values.iloc[-1]) if len(values) else float("nan")


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


def _mean_and_std(name: str, values: pd.Series) -> dict[str, float | None]:
    """Mean, and the sample standard deviation of more than one value."""
    return {f"{name}_mean": _number(values.mean()), f"{name}_std": _number(values.std())}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _whole(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _descending(accuracy: float | None) -> float:
    """A sort key: high accuracies first, methods that were never evaluated last."""
    return float("inf") if accuracy is None else -accuracy
