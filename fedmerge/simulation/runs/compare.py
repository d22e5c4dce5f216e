"""Run every method of a configuration on every seed, and leave records behind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fedmerge.errors import FedMergeError, RecordError, WriteError
from fedmerge.observers import Observer, ObserverLike, make_observers
from fedmerge.records.atomic_files import read_toml
from fedmerge.records.locks import LOCK, held
from fedmerge.records.run_records import continuing, differing, differing_federation
from fedmerge.simulation.grids.simulation_grid import SimulationGrid, make_workers
from fedmerge.simulation.runs.config_model import Config
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.simulation.runs.method_run import run_on_grid
from fedmerge.simulation.runs.own_training_checks import check_own_training, check_schedules
from fedmerge.simulation.runs.recorder import Row
from fedmerge.simulation.runs.unfinished import begin, end, finished_runs, is_finished, run_folder
from fedmerge.simulation.workers.workers import Workers
from fedmerge.training.device import choose_device

__all__ = ["FailedRun", "Outcome", "check_output", "compare", "run_folder", "run_on_grid"]

log = logging.getLogger("fedmerge")


def check_output(config: Config, out: Path) -> None:
    """Make sure that a folder can take a comparison: it is new, or holds runs of the same federation.

    Runs of other methods, options and seeds may stand there, and shorter ones of the same: a comparison grows.

    Raises
    ------
    RecordError
        A record would be replaced, or compared with runs of another federation.
    """
    first = config.resolved(config.methods[0], config.seeds[0])
    for folder in finished_runs(out):
        other = differing_federation(read_toml(folder / "config.toml"), first)
        if other:
            raise RecordError(_ANOTHER.format(folder, ", ".join(other)))
    for method in config.methods:
        for seed in config.seeds:
            folder, wanted = run_folder(out, method, seed), config.resolved(method, seed)
            if not folder.exists():
                continue
            done = read_toml(folder / "config.toml")
            if differing(done, wanted) == ["rounds"] and done.get("rounds", 0) > config.rounds:
                raise RecordError(
                    f"{folder} has {done['rounds']} rounds already, and {config.rounds} were asked for: "
                    f"ask for at least {done['rounds']}, choose another --out, or pass --overwrite"
                )
            other = continuing(done, wanted)
            if other:
                raise RecordError(_ANOTHER.format(folder, ", ".join(other)))


_ANOTHER = "{} holds a run of another configuration (it differs in {}): choose another --out, or pass --overwrite"


@dataclass(frozen=True)
class FailedRun:
    """A run that ended before its last round, and why; its rows so far stand in ``<folder>.partial``."""

    folder: Path
    error: FedMergeError


class Outcome(NamedTuple):
    """Folders of the finished runs, and the runs that failed."""

    runs: list[Path]
    failed: list[FailedRun]


def compare(
    config: Config,
    out: Path,
    on_row: Callable[[Row], None] | None = None,
    *,
    observers: Sequence[ObserverLike] = (),
    resume: bool = False,
    grow: bool = False,
    locked: bool = False,
) -> Outcome:
    """Run the whole comparison; methods share partition, initial model and batches of a seed.

    Parameters
    ----------
    config
        What to run.
    out
        Folder for the records, one folder per run.
    on_row
        Called with the row of every round, once it is written.
    observers
        Who watches the runs besides those that the configuration names, one after the other; see
        :class:`fedmerge.observers.Observer`. Those that are named are made anew for each run.
    resume
        Go on with what an interrupted call left in `out`: runs that are finished stay, those that were begun
        continue after their last checkpoint.
    grow
        Add to what stands in `out`: finished runs stay, those with fewer rounds go on. Without it they are replaced.
    locked
        The caller holds the lock on `out` already, :data:`fedmerge.records.locks.LOCK` in it.

    Returns
    -------
    Outcome
        The folders of finished runs, and those that failed: a method that diverges does not stop the others.

    Raises
    ------
    FedMergeError
        Before anything is written, if the data, partition, model or a strategy cannot be made.
    FolderInUse
        Another process writes to `out`, or to one of its records.
    WriteError
        The disk is full, or does not take the record for another reason. All but the round under way is kept.
    """
    choose_device(config.device)
    experiments = [Experiment(config, seed) for seed in config.seeds]
    with _quiet(config.threads):  # strategies of Flower's tell at once what they are made with
        for experiment in experiments:
            experiment.check_model()
            if experiment is experiments[0]:
                check_schedules(experiment)
            for method in config.methods:
                own = experiment.of_method(method)
                if own != experiment:
                    own.check_model()
                own.strategy(method)
                if experiment is experiments[0]:
                    check_own_training(own, method)
    watching = make_observers(observers)
    make_observers(config.observers)
    with nullcontext() if locked else held(out / LOCK, out), _quiet(config.threads):
        workers = make_workers(config.workers, config.engine, config.round_timeout)
        try:
            if not resume:
                begin(config, out, grow=grow)
            outcome = _run_all(config, experiments, workers, out, on_row, watching, resume=resume, grow=grow)
        finally:
            workers.close()
        end(config, out)
    return outcome


def _run_all(
    config: Config,
    experiments: Sequence[Experiment],
    workers: Workers,
    out: Path,
    on_row: Callable[[Row], None] | None,
    observers: Sequence[Observer],
    *,
    resume: bool,
    grow: bool,
) -> Outcome:
    """Run what is not finished yet."""
    outcome = Outcome([], [])
    for experiment in experiments:
        for method in config.methods:
            if (resume or grow) and is_finished(config, method, experiment.seed, out):
                outcome.runs.append(run_folder(out, method, experiment.seed))
                continue
            own = experiment.of_method(method)
            grid = SimulationGrid(own.client_app(), experiment.num_clients, workers=workers)
            try:
                run = run_on_grid(experiment, method, grid, out, on_row, observers=observers, resume=resume or grow)
                outcome.runs.append(run)
            except WriteError as error:
                remedy = f"{error.remedy}; then `fedmerge resume {out}` goes on after the last whole checkpoint"
                raise WriteError(error.path, error.reason, remedy) from error
            except FedMergeError as error:
                outcome.failed.append(FailedRun(run_folder(out, method, experiment.seed), error))
    return outcome


@contextmanager
def _quiet(threads: int) -> Iterator[None]:
    """Keep Flower's log out of the progress, unless it is asked for, and torch to its threads while simulating."""
    flower, before = logging.getLogger("flwr"), torch.get_num_threads()
    level = flower.level
    flower.setLevel(logging.INFO if log.isEnabledFor(logging.INFO) else logging.ERROR)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        flower.setLevel(level)
        torch.set_num_threads(before)
