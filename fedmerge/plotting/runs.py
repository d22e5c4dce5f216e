"""Reading run records: folders with a `rounds.jsonl` become `Run`s, or an error says which line is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmerge.errors import InvalidOption, RecordError, shown
from fedmerge.plain_text import one_line

__all__ = ["Run", "by_method", "extra_metrics", "main_measure", "read_runs"]

ROWS = "rounds.jsonl"
CONFIG = "config.toml"
IN_PROGRESS = ".partial"
LONGEST_NAME = 160  # characters: pictures and tables have no room for more

COUNTS = ("seed", "round", "clients_ok", "clients_failed", "bytes_down", "bytes_up", "parameters")
SECONDS = ("seconds_train", "seconds_merge", "seconds_evaluate")
MEASURES = ("test_loss", "test_accuracy", "train_loss")  # null where nothing was measured
STEPS = "local_steps"  # missing in older records, null where clients do not tell
KEYS = ("method", *COUNTS, *SECONDS, *MEASURES)


@dataclass(frozen=True)
class Run:
    """One method with one seed: the rows of its `rounds.jsonl`, in order of rounds."""

    method: str
    seed: int
    rows: tuple[dict[str, Any], ...]
    folder: Path


def read_runs(folders: Sequence[Path], labels: Sequence[str] | None = None) -> list[Run]:
    """Read every run in `folders`.

    Parameters
    ----------
    folders
        Run folders (with a `rounds.jsonl`) and comparison folders (with run folders in them), in any mix.
        Runs in progress (`*.partial`) within a comparison folder are left out.
    labels
        One for each folder, which then stands behind its methods: comparisons that have the same methods can be
        read together.

    Returns
    -------
    list of Run
        In the order of `folders`; within a comparison by method name, then seed. A folder that is named twice
        is read once.

    Raises
    ------
    RecordError
        A folder is missing or holds no run, a line is broken or lacks a key, or two folders hold the
        same method with the same seed and label.
    InvalidOption
        There are not as many labels as folders.

    Examples
    --------
    >>> runs = read_runs([Path("runs/digits")])  # doctest: +SKIP
    >>> [(run.method, run.seed, len(run.rows)) for run in runs]  # doctest: +SKIP
    [('fedavg', 0, 21), ('fedavg', 1, 21), ('fednova', 0, 21), ('fednova', 1, 21)]
    """
    if not folders:
        raise RecordError("no folder was given. Name the folder of a comparison or of a run.")
    if labels is not None and len(labels) != len(folders):
        raise InvalidOption(f"{len(labels)} labels for {len(folders)} folders: give one each, in their order.")
    runs: dict[tuple[str, int], Run] = {}
    for i, folder in enumerate(folders):
        recorded = [_read_run(path) for path in _run_folders(Path(folder))]
        if labels is not None:
            recorded = [replace(run, method=f"{run.method} ({one_line(labels[i], LONGEST_NAME)})") for run in recorded]
        for run in sorted(recorded, key=lambda run: (run.method, run.seed)):
            first = runs.setdefault((run.method, run.seed), run)
            if first.folder.resolve() != run.folder.resolve():
                raise RecordError(
                    f"{run.method} with seed {run.seed} is in {first.folder} and in {run.folder}. "
                    "A mean over seeds would count it twice: tell them apart, as with `fedmerge plot --labels a,b`."
                )
    return list(runs.values())


def main_measure(runs: Sequence[Run]) -> str:
    """What runs are compared by: ``"test_accuracy"``, or ``"test_loss"`` where none of them has an accuracy.

    Raises
    ------
    RecordError
        Some have an accuracy and others none: they are not of one task.
    """
    measured = [any(row.get("test_loss") is not None for row in run.rows) for run in runs]
    decided = [any(row["test_accuracy"] is not None for row in run.rows) for run in runs]
    undecided = [run for run, loss, accuracy in zip(runs, measured, decided, strict=True) if loss and not accuracy]
    if any(decided) and undecided:
        raise RecordError(
            f"{undecided[0].folder} has no accuracy, as in a regression, and other runs have: compare runs of one task"
        )
    return "test_loss" if undecided else "test_accuracy"


def extra_metrics(runs: Sequence[Run]) -> list[str]:
    """Names of the further metrics that runs were judged by, in order of first appearance.

    Examples
    --------
    >>> extra_metrics([Run("fedavg", 0, ({"test_loss": 1.0, "test_accuracy": None, "test_mae": 2.0},), Path())])
    ['mae']
    """
    keys = (key for run in runs for row in run.rows for key in row if key.startswith("test_") and key not in MEASURES)
    return [key.removeprefix("test_") for key in dict.fromkeys(keys)]


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method, methods in order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


def _run_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise RecordError(f"{folder} {what}. Name the folder of a comparison or of a run.")
    if folder.name.endswith(IN_PROGRESS):
        raise RecordError(f"{folder} is a run in progress. Wait for it to finish, or resume it.")
    if (folder / ROWS).exists():
        return [folder]
    # A folder with a configuration is a run: leaving it out because its rows are lost would hide a seed.
    inside = [path for path in sorted(folder.iterdir()) if (path / ROWS).exists() or (path / CONFIG).exists()]
    done = [path for path in inside if not path.name.endswith(IN_PROGRESS)]
    if not done:
        waiting = f", only {len(inside)} in progress (*{IN_PROGRESS})" if inside else ""
        raise RecordError(
            f"{folder} holds no finished run{waiting}. A run is a folder with {ROWS} in it; "
            "`fedmerge compare --out DIR` and `fedmerge run` write them."
        )
    return done


def _read_run(folder: Path) -> Run:
    file = folder / ROWS
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{file} cannot be read: {error}. Run it again.") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise RecordError(f"{file} has no rows. Run it again, or remove {folder}.")
    rows: list[dict[str, Any]] = []
    for number, line in numbered:
        where = f"{file}, line {number}"
        row = _parse(line, where, last=number == numbered[-1][0])
        _check(row, where)
        if rows:
            _check_order(rows[-1], row, where)
        rows.append(row)
    return Run(one_line(rows[0]["method"], LONGEST_NAME), rows[0]["seed"], tuple(rows), folder)


def _parse(line: str, where: str, *, last: bool) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # of JSON, or of endless numbers and nesting
        if last:
            raise RecordError(
                f"{where}: the last line is cut off, as by a crash in mid-write. "
                "Delete this line (the rounds before it are whole) or run it again."
            ) from error
        raise RecordError(f"{where}: not valid JSON ({error}). Repair the line or run it again.") from error
    if not isinstance(row, dict):
        raise RecordError(f"{where}: expected an object, found {type(row).__name__}. Run it again.")
    return row


def _check(row: Mapping[str, Any], where: str) -> None:
    """Every key is there, with a value that can be counted with."""
    missing = [key for key in KEYS if key not in row]
    if missing:
        raise RecordError(f"{where}: lacks {', '.join(missing)}. Was it written by another version? Run it again.")
    bad = [key for key in (*KEYS, STEPS) if key in row and not _valid(key, row[key])]
    if bad:
        values = ", ".join(f"{key} = {shown(row[key])}" for key in bad)
        raise RecordError(
            f"{where}: {values}. Counts and seconds are numbers from 0, accuracies lie in [0, 1]. Run it again."
        )


def _valid(key: str, value: Any) -> bool:
    if key == "method":
        return isinstance(value, str) and value != ""
    if value is None:
        return key in (*MEASURES, STEPS)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if key in ("test_loss", "train_loss"):
        return True  # the loss of a run that diverged is NaN or infinite
    if key in ("seed", "round") and isinstance(value, float):
        return False
    return 0 <= value <= (1 if key == "test_accuracy" else sys.float_info.max)


def _check_order(previous: Mapping[str, Any], row: Mapping[str, Any], where: str) -> None:
    """A file is one run, its rounds in order: anything else would be summed up wrongly."""
    for key in ("method", "seed"):
        if row[key] != previous[key]:
            raise RecordError(
                f"{where}: {key} is {shown(row[key])}, but {shown(previous[key])} in the line before. "
                "A file holds one run: give each run a folder of its own."
            )
    if row["round"] <= previous["round"]:
        raise RecordError(
            f"{where}: round {row['round']} comes after round {previous['round']}. "
            "Two processes wrote to this file: run it again."
        )
