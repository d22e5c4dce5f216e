"""One run of one method: its rounds on a grid, who watches them, and what goes wrong."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from traceback import extract_tb
from typing import Any

from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedmerge.errors import FedMergeError, NothingMerged, RecordError
from fedmerge.merging import Pipeline
from fedmerge.observers import Observer, ObserverLike, Run, RunStopped, Watch, make_observers
from fedmerge.records.atomic_files import read_toml
from fedmerge.records.checkpoints import Checkpoint
from fedmerge.records.locks import held
from fedmerge.records.run_records import PARTIAL, RunRecord, lock_of
from fedmerge.seeding import integer_seed
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.simulation.grids.faulty_grid import FaultyGrid
from fedmerge.simulation.grids.policed_grid import PolicedGrid
from fedmerge.simulation.runs.environment import describe_environment
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.simulation.runs.record_observer import Keeping
from fedmerge.simulation.runs.recorder import Recorder, Row
from fedmerge.simulation.runs.snapshot import cannot_restore, restore
from fedmerge.simulation.runs.unfinished import run_folder
from fedmerge.strategies import MergeStrategy
from fedmerge.strategies.numbering import counts_itself, start_after
from fedmerge.strategies.policies import RoundPolicies
from fedmerge.wire.record_values import to_arrays

__all__ = ["run_on_grid"]

log = logging.getLogger("fedmerge")


def run_on_grid(
    experiment: Experiment,
    method: str,
    grid: Grid,
    out: Path,
    on_row: Callable[[Row], None] | None = None,
    *,
    observers: Sequence[ObserverLike] = (),
    resume: bool = False,
) -> Path:
    """Run one method on any grid, Flower's own included, and return the folder of its record.

    With `resume` it goes on after the last checkpoint of an interrupted run, where there is one; one that an observer
    has stopped does not, as long as the configuration names the same observers. `observers` are told besides those of
    the configuration, and `on_row` is called with each row when it is written.

    Raises
    ------
    FedMergeError
        The run cannot go on, it merged nothing, or its checkpoints cannot be used.
    FolderInUse
        Another process writes the record.
    """
    folder, experiment = run_folder(out, method, experiment.seed), experiment.of_method(method)
    with held(lock_of(folder), folder):
        watching = [*make_observers(experiment.config.observers), *make_observers(observers)]
        return _run_locked(experiment, method, grid, out, watching, on_row, resume=resume)


def _run_locked(
    experiment: Experiment,
    method: str,
    grid: Grid,
    out: Path,
    watching: Sequence[Observer],
    on_row: Callable[[Row], None] | None,
    *,
    resume: bool,
) -> Path:
    strategy = experiment.strategy(method)
    before = _observers_of(run_folder(out, method, experiment.seed)) if resume else None
    record, checkpoint = _record(experiment, method, out, resume, strategy)
    # References are those of round 1: where that is over, nobody needs its messages.
    done = 0 if checkpoint is None else checkpoint.round
    config, mishaps, ours = experiment.config, experiment.mishaps, isinstance(strategy, MergeStrategy)
    faulty = None if mishaps is None else FaultyGrid(grid, mishaps, config.round_timeout)
    measured = MeasuredGrid(faulty or grid, keep_trained=config.references and done == 0, average=not ours)
    policies = RoundPolicies(config.on_client_error, config.on_too_few)
    under_way = 0 if checkpoint is None else done + 1
    policed = PolicedGrid(measured, method, policies, config.min_clients, ours=ours, round=under_way)
    model = experiment.initial_arrays() if checkpoint is None else to_arrays(checkpoint.section("state"))
    rows, watch = record.rows(), Watch([*watching, Keeping(record, strategy, measured.innermost)], on_row)
    recorder = Recorder(
        method, experiment, strategy,
        grid=measured, policed=policed, watch=watch, before=rows, model=model, faulty=faulty,
    )  # fmt: skip
    keywords: dict[str, Any] = {
        "grid": policed,
        "initial_arrays": model,
        "num_rounds": config.rounds,
        # Strategies that are not ours do not know our seed, and clients must.
        "train_config": ConfigRecord({"seed": experiment.seed}),
        "evaluate_fn": recorder,
    }
    if config.round_timeout is not None:
        keywords["timeout"] = config.round_timeout
    run = Run(
        method, experiment.seed, config.rounds,
        done=done, rows=tuple(rows), folder=record.partial, final=record.folder,
        config=config.resolved(method, experiment.seed),
    )  # fmt: skip
    with watch.over(run):
        # Of rounds that were run before an interruption a strategy knows nothing; the record does.
        with _seeded_random(experiment.seed), _typed_errors(method, strategy), suppress(NothingMerged, RunStopped):
            watch.check(rows[-1].get("stopped") if rows and before == list(config.observers) else None)
            start: Callable[..., Any] = strategy.start
            if checkpoint is not None:
                restore(checkpoint, strategy, grid)
                if isinstance(strategy, MergeStrategy):
                    strategy.begin_after(done)
                else:
                    start = partial(start_after, done, strategy)
            start(**keywords)
        recorder.check_merged()
    return record.folder


def _record(
    experiment: Experiment, method: str, out: Path, resume: bool, strategy: Strategy
) -> tuple[RunRecord, Checkpoint | None]:
    """The record to write, and what to go on from, if anything."""
    seed, keep = experiment.seed, experiment.config.keep_checkpoints
    folder, settings = run_folder(out, method, seed), experiment.config.resolved(method, seed)
    partition = experiment.partition.to_tensors()
    if resume:
        record, checkpoint = RunRecord.reopen(folder, settings, keep_checkpoints=keep)
        problem = None if checkpoint is None else cannot_restore(checkpoint)
        if checkpoint is not None and not isinstance(strategy, MergeStrategy) and counts_itself(strategy):
            problem = f"{type(strategy).__name__} has a start of its own, which counts rounds from one"
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


def _observers_of(folder: Path) -> list[str]:
    """What the configuration of a run that was begun says of observers."""
    file = folder.with_name(folder.name + PARTIAL) / "config.toml"
    return list(read_toml(file).get("observers", ())) if file.exists() else []


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
    """What somebody else's code raises, say at an update that it cannot average, ends its run and no other."""
    try:
        yield
    except FedMergeError:
        raise
    except Exception as error:
        if isinstance(strategy, MergeStrategy) and _is_ours(strategy.pipeline):
            raise
        place = extract_tb(error.__traceback__)[-1]
        raise FedMergeError(
            f"{method} cannot go on: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        ) from error


def _is_ours(pipeline: Pipeline) -> bool:
    """Whether every part of a method is fedmerge's: what such a part raises is a defect, whose traceback is wanted."""
    parts = (
        pipeline.aggregator,
        *pipeline.edits,
        *pipeline.server_steps,
        *pipeline.refinements,
        *pipeline.trajectories,
    )
    return all(type(part).__module__.partition(".")[0] == "fedmerge" for part in parts)
