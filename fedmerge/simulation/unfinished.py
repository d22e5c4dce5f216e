"""Which runs of a comparison are finished, begun or still to come: what is on disk after a kill says it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmerge.errors import RecordError
from fedmerge.files import read_toml, write_toml, writing
from fedmerge.records import PARTIAL, differing
from fedmerge.simulation.config import Config, load_config, make_config

__all__ = ["PLAN", "Unfinished", "begin", "end", "find_unfinished", "is_finished", "run_folder"]

PLAN = "unfinished.toml"
"""The configuration of a comparison, in its folder until every run has ended."""


def run_folder(out: Path, method: str, seed: int) -> Path:
    """Where the record of one run stands."""
    name = method.translate({ord(":"): ".", ord("("): "-", ord(","): "-", ord(")"): None})
    return out / f"{name}-seed{seed}"


def begin(config: Config, out: Path) -> None:
    """Leave word of what a comparison is to run; what an earlier one began of the same runs is dropped."""
    with writing(out):
        (out / PLAN).unlink(missing_ok=True)  # until the new one is there, nothing is to be resumed
        for method in config.methods:
            for seed in config.seeds:
                begun = _partial(run_folder(out, method, seed))
                if begun.exists():
                    shutil.rmtree(begun)
    write_toml(out / PLAN, config.model_dump(mode="json"))


def end(out: Path) -> None:
    """Every run has ended."""
    (out / PLAN).unlink(missing_ok=True)


def is_finished(config: Config, method: str, seed: int, out: Path) -> bool:
    """Whether the record of a run is complete, and nothing newer of it was begun."""
    folder = run_folder(out, method, seed)
    if _partial(folder).exists() or not (folder / "config.toml").exists():
        return False
    # With --overwrite a comparison replaces records of other configurations, which may still stand there.
    return not differing(read_toml(folder / "config.toml"), config.resolved(method, seed))


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
    if (folder / PLAN).exists():
        return Unfinished(folder, [make_config(load_config(folder / PLAN))], whole=True)
    run = folder.with_name(folder.name.removesuffix(PARTIAL))
    for candidate in (_partial(run), run):
        if (candidate / "config.toml").exists():
            return Unfinished(run.parent, [make_config(load_config(candidate / "config.toml"))], whole=False)
    # No plan: every run on its own, finished ones too, for they belong into the table.
    files = sorted(folder.glob("*/config.toml"))
    files = [file for file in files if file.parent.name.endswith(PARTIAL) or not _partial(file.parent).exists()]
    if not files:
        raise RecordError(
            f"{folder} holds no run, neither finished nor begun: start it with `fedmerge compare --out {folder}`"
        )
    return Unfinished(folder, [make_config(load_config(file)) for file in files], whole=True)
