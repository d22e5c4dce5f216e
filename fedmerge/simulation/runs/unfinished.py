"""Which runs of a comparison are finished, begun or still to come: what is on disk after a kill says it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from fedmerge.errors import FedMergeError, RecordError
from fedmerge.records.atomic_files import read_toml, write_toml, writing
from fedmerge.records.locks import held
from fedmerge.records.run_records import PARTIAL, continuing, differing, differing_federation, lock_of
from fedmerge.simulation.runs.config import Config, load_config, make_config

__all__ = [
    "PLAN",
    "Unfinished",
    "begin",
    "check_not_begun",
    "end",
    "find_unfinished",
    "finished_runs",
    "is_finished",
    "run_folder",
]

PLAN = "unfinished.toml"
"""The configuration of a comparison, in its folder until every run has ended."""


_IN_FOLDERS = {ord(":"): ".", ord("/"): ".", ord("\\"): ".", ord("("): "-", ord(","): "-", ord(")"): None}


def run_folder(out: Path, method: str, seed: int) -> Path:
    """Where the record of one run stands."""
    name = method.translate(_IN_FOLDERS)
    return out / f"{name}-seed{seed}"


def begin(config: Config, out: Path, *, grow: bool = False) -> None:
    """Leave word of what a comparison is to run.

    What an earlier one began of the same runs, or was to run besides, is dropped. With `grow` it is kept where it can
    go on, and finished runs with fewer rounds are opened again.

    Raises
    ------
    FolderInUse
        Another process writes one of the records.
    """
    runs = _runs(config)
    planned = [] if grow else _planned(out)
    with ExitStack() as stack:
        for folder in {run_folder(out, *run) for run in (*runs, *planned)}:
            stack.enter_context(held(lock_of(folder), folder))
        with writing(out):
            (out / PLAN).unlink(missing_ok=True)  # until the new one is there, nothing is to be resumed
            for method, seed in dict.fromkeys((*runs, *planned)):
                begun = _partial(run_folder(out, method, seed))
                if begun.exists() and not (grow and _goes_on(begun, config, method, seed)):
                    shutil.rmtree(begun)
        write_toml(out / PLAN, config.model_dump(mode="json"))
        with writing(out):
            for method, seed in runs if grow else ():
                folder = run_folder(out, method, seed)
                if not is_finished(config, method, seed, out) and _goes_on(folder, config, method, seed):
                    if _partial(folder).exists():  # a longer one was begun beside it
                        continue
                    folder.rename(_partial(folder))


def _planned(out: Path) -> list[tuple[str, int]]:
    """What a comparison that was interrupted was to run; nothing where its plan is damaged, or there is none."""
    with suppress(FedMergeError):
        if (out / PLAN).exists():
            return _runs(make_config(load_config(out / PLAN)))
    return []


def check_not_begun(config: Config, out: Path) -> None:
    """Make sure that nothing was begun, and is not finished, which `config` would begin anew or add to.

    Raises
    ------
    RecordError
        A comparison was interrupted there, or one of the runs was.
    """
    begun = [folder.name for run in _runs(config) if (folder := _partial(run_folder(out, *run))).exists()]
    if (out / PLAN).exists() or begun:
        what = "a comparison that was interrupted" if (out / PLAN).exists() else f"{begun[0]}, a run that did not end"
        raise RecordError(
            f"{out} holds {what}: `fedmerge resume {out}` goes on with it; "
            "or pass --overwrite to start again, or choose another --out"
        )


def _runs(config: Config) -> list[tuple[str, int]]:
    return [(method, seed) for method in config.methods for seed in config.seeds]


def _goes_on(folder: Path, config: Config, method: str, seed: int) -> bool:
    """Whether the run in `folder` is one that only wants more rounds, or its end."""
    file = folder / "config.toml"
    if not file.exists() or not (folder / "checkpoint").exists():
        return False
    return not continuing(read_toml(file), config.resolved(method, seed))


def finished_runs(out: Path) -> list[Path]:
    """The folders of all finished runs in a comparison's folder."""
    return [file.parent for file in sorted(out.glob("*/config.toml")) if not file.parent.name.endswith(PARTIAL)]


def end(config: Config, out: Path) -> None:
    """The runs of `config` have ended: the plan goes, unless there are others in it which are still to be run."""
    done = _runs(config)
    with suppress(FedMergeError):
        plan = make_config(load_config(out / PLAN)) if (out / PLAN).exists() else config
        if not all(run in done or is_finished(plan, *run, out) for run in _runs(plan)):
            return
    with writing(out):
        (out / PLAN).unlink(missing_ok=True)


def is_finished(config: Config, method: str, seed: int, out: Path) -> bool:
    """Whether the record of a run is complete, and nothing newer of it was begun.

    One that an observer has stopped is, unless other observers are asked for.
    """
    folder = run_folder(out, method, seed)
    if _partial(folder).exists() or not (folder / "config.toml").exists():
        return False
    done, wanted = read_toml(folder / "config.toml"), config.resolved(method, seed)
    if list(done.get("observers", ())) != list(wanted["observers"]) and _stopped(folder):
        return False
    # With --overwrite a comparison replaces records of other configurations, which may still stand there.
    return not differing(done, wanted)


def _stopped(folder: Path) -> bool:
    """Whether an observer has ended the run in `folder` early."""
    file = folder / "rounds.jsonl"
    last = file.read_bytes().splitlines()[-1:] if file.exists() else []
    return bool(last) and bool(json.loads(last[0]).get("stopped"))


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


@dataclass(frozen=True)
class Unfinished:
    """What `fedmerge resume` has to do.

    Parameters
    ----------
    out
        Folder of the runs.
    configs
        What is to be run there, finished runs included.
    whole
        Whether it is a whole comparison, which has a table and pictures.
    """

    out: Path
    configs: Sequence[Config]
    whole: bool


def find_unfinished(folder: Path) -> Unfinished:
    """Find what was interrupted in a comparison's folder, or in a run's.

    Parameters
    ----------
    folder
        Folder of a comparison, of a run, or of a run in progress (``*.partial``).

    Raises
    ------
    RecordError
        There is nothing of the kind, or a configuration cannot be read.
    """
    folder = folder if folder.name else folder.resolve()  # "." has no name to look at
    if not folder.exists() and not _partial(folder).exists():
        raise RecordError(f"{folder} does not exist: name the folder of a comparison or of a run")
    if folder.is_file():
        raise RecordError(f"{folder} is a file: name the folder of a comparison or of a run")
    if (folder / PLAN).exists():
        return Unfinished(folder, [make_config(load_config(folder / PLAN))], whole=True)
    run = folder.with_name(folder.name.removesuffix(PARTIAL))
    for candidate in (_partial(run), run):
        if (candidate / "config.toml").exists():
            return Unfinished(run.parent, [make_config(load_config(candidate / "config.toml"))], whole=False)
    # No plan: every run on its own, finished ones too, for they belong into the table.
    files = sorted(folder.glob("*/config.toml"))
    files = [file for file in files if file.parent.name.endswith(PARTIAL) or not _partial(file.parent).exists()]
    if not files and (folder.parent / "config.toml").exists():
        raise RecordError(f"{folder} is a part of a run: name the run's folder, {folder.parent}")
    if not files:
        raise RecordError(
            f"{folder} holds no run, neither finished nor begun: start it with `fedmerge compare --out {folder}`"
        )
    _check_one_federation(files)
    return Unfinished(folder, [make_config(load_config(file)) for file in files], whole=True)


def _check_one_federation(files: Sequence[Path]) -> None:
    """What `--overwrite` left of another federation has no place in this one's table."""
    first = read_toml(files[0])
    for file in files[1:]:
        other = differing_federation(first, read_toml(file))
        if other:
            raise RecordError(
                f"{file.parent} and {files[0].parent} are runs of two federations (they differ in {', '.join(other)}): "
                "name the folder of the run to resume, or delete the one that is no longer wanted"
            )
