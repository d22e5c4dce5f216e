"""Run every method of a configuration on every seed, and leave records behind."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedmerge.checkpoints import Checkpoint
from fedmerge.environment import describe_environment
from fedmerge.errors import FedMergeError, NothingMerged, RecordError, WriteError
from fedmerge.files import read_toml
from fedmerge.locks import LOCK, held
from fedmerge.records import RunRecord, continuing, differing, differing_federation, lock_of
from fedmerge.seeding import integer_seed
from fedmerge.simulation.config import Config
from fedmerge.simulation.exchanges import MeasuredGrid
from fedmerge.simulation.experiment import Experiment
from fedmerge.simulation.faulty_grid import FaultyGrid
from fedmerge.simulation.grid import SimulationGrid, make_workers
from fedmerge.simulation.recorder import Recorder, Row
from fedmerge.simulation.snapshot import cannot_restore, restore
from fedmerge.simulation.unfinished import begin, end, finished_runs, is_finished, run_folder
from fedmerge.simulation.workers import Workers
from fedmerge.strategies import MergeStrategy
from fedmerge.strategies.numbering import start_after
from fedmerge.strategies.wire import to_arrays
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
    on_row: Callable[[Row], None],
    *,
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
        Called after every round with its row.
    resume
        Go on with what an interrupted call left in `out`: runs that are finished stay, those that were begun
        continue after their last checkpoint.
    grow
        Add to what stands in `out`: finished runs stay, those with fewer rounds go on. Without it they are replaced.
    locked
        The caller holds the lock on `out` already, :data:`fedmerge.locks.LOCK` in it.

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
    for experiment in experiments:
        experiment.check_model()
        for method in config.methods:
            experiment.strategy(method)
    with nullcontext() if locked else held(out / LOCK, out), _quiet(config.threads):
        workers = make_workers(config.workers, config.engine, config.round_timeout)
        try:
            if not resume:
                begin(config, out, grow=grow)
            outcome = _run_all(config, experiments, workers, out, on_row, resume=resume, grow=grow)
        finally:
            workers.close()
        end(config, out)
    return outcome


def _run_all(
    config: Config,
    experiments: Sequence[Experiment],
    workers: Workers,
    out: Path,
    on_row: Callable[[Row], None],
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
            grid = SimulationGrid(experiment.client_app(), experiment.num_clients, workers=workers)
            try:
                outcome.runs.append(run_on_grid(experiment, method, grid, out, on_row, resume=resume or grow))
            except WriteError as error:
                remedy = f"{error.remedy}; then `fedmerge resume {out}` goes on after the last whole checkpoint"
                raise WriteError(error.path, error.reason, remedy) from error
            except FedMergeError as error:
                outcome.failed.append(FailedRun(run_folder(out, method, experiment.seed), error))
    return outcome


def run_on_grid(
    experiment: Experiment,
    method: str,
    grid: Grid,
    out: Path,
    on_row: Callable[[Row], None],
    *,
    resume: bool = False,
) -> Path:
    """Run one method on any grid, Flower's own included, and return the folder of its record.

    With `resume` it goes on after the last checkpoint of an interrupted run, where there is one.

    Raises
    ------
    FedMergeError
        The run cannot go on, it merged nothing, or its checkpoints cannot be used.
    FolderInUse
        Another process writes the record.
    """
    folder = run_folder(out, method, experiment.seed)
    with held(lock_of(folder), folder):
        return _run_locked(experiment, method, grid, out, on_row, resume=resume)


def _run_locked(
    experiment: Experiment, method: str, grid: Grid, out: Path, on_row: Callable[[Row], None], *, resume: bool
) -> Path:
    strategy = experiment.strategy(method)
    record, checkpoint = _record(experiment, method, out, resume)
    # References are those of round 1: where that is over, nobody needs its messages.
    first = checkpoint is None or checkpoint.round == 0
    config, mishaps = experiment.config, experiment.mishaps
    faulty = None if mishaps is None else FaultyGrid(grid, mishaps, config.round_timeout)
    measured = MeasuredGrid(faulty or grid, keep_trained=config.references and first)
    recorder = Recorder(
        method, experiment, strategy=strategy, grid=measured, record=record, on_row=on_row, faulty=faulty
    )
    keywords: dict[str, Any] = {
        "grid": measured,
        "initial_arrays": experiment.initial_arrays(),
        "num_rounds": config.rounds,
        # Strategies that are not ours do not know our seed, and clients must.
        "train_config": ConfigRecord({"seed": experiment.seed}),
        "evaluate_fn": recorder,
    }
    if config.round_timeout is not None:
        keywords["timeout"] = config.round_timeout
    # Of rounds that were run before an interruption a strategy knows nothing; the record does.
    with _seeded_random(experiment.seed), _typed_errors(method, strategy), suppress(NothingMerged):
        if checkpoint is None:
            strategy.start(**keywords)
        else:
            restore(checkpoint, strategy, grid)
            keywords["initial_arrays"] = to_arrays(checkpoint.section("state"))
            start_after(checkpoint.round, strategy, strategy.start, **keywords)
    recorder.check_merged()
    return record.finish()


def _record(experiment: Experiment, method: str, out: Path, resume: bool) -> tuple[RunRecord, Checkpoint | None]:
    """The record to write, and what to go on from, if anything."""
    seed, keep = experiment.seed, experiment.config.keep_checkpoints
    folder, settings = run_folder(out, method, seed), experiment.config.resolved(method, seed)
    partition = experiment.partition.to_tensors()
    if resume:
        record, checkpoint = RunRecord.reopen(folder, settings, keep_checkpoints=keep)
        problem = None if checkpoint is None else cannot_restore(checkpoint)
        if checkpoint is not None and problem is None:
            if not record.has_partition(partition):
                raise RecordError(
                    f"{record.partial}: the data divide among clients otherwise than when it was begun: "
                    "restore the data, or delete the folder to start again"
                )
            record.note_environment(describe_environment() | {"after_round": checkpoint.round})
            return record, checkpoint
        if problem is not None:
            log.warning("%s starts again from the first round: %s", folder.name, problem)
    record = RunRecord(folder, settings, keep_checkpoints=keep)
    record.write_partition(partition)
    record.note_environment(describe_environment())
    return record, None


@contextmanager
def _seeded_random(seed: int) -> Iterator[None]:
    """Flower's own strategies sample clients from Python's global generator: make that repeatable."""
    before = random.getstate()
    random.seed(integer_seed(seed, "global sampling"))
    try:
        yield
    finally:
        random.setstate(before)


@contextmanager
def _typed_errors(method: str, strategy: Strategy) -> Iterator[None]:
    """What somebody else's strategy raises, say at an update that it cannot average, ends its run and no other."""
    try:
        yield
    except FedMergeError:
        raise
    except Exception as error:
        if isinstance(strategy, MergeStrategy):
            raise
        raise FedMergeError(f"{method} cannot go on: {type(error).__name__}: {error}") from error


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
