"""Run every method of a configuration on every seed, and leave records behind."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedmerge.errors import FedMergeError, RecordError
from fedmerge.records import RunRecord, read_toml
from fedmerge.seeding import integer_seed
from fedmerge.simulation.config import Config
from fedmerge.simulation.exchanges import MeasuredGrid
from fedmerge.simulation.experiment import Experiment
from fedmerge.simulation.grid import SimulationGrid, make_workers
from fedmerge.simulation.recorder import Recorder, Row
from fedmerge.training.device import choose_device

__all__ = ["FailedRun", "Outcome", "check_output", "compare", "run_folder", "run_on_grid"]

# These change how fast a run is, not what comes out, so a record may differ in them.
_HOW = ("workers", "threads", "engine")


def run_folder(out: Path, method: str, seed: int) -> Path:
    """Where the record of one run stands."""
    name = method.translate({ord(":"): ".", ord("("): "-", ord(","): "-", ord(")"): None})
    return out / f"{name}-seed{seed}"


def check_output(config: Config, out: Path) -> None:
    """Make sure that no record of another configuration would be replaced.

    Raises
    ------
    RecordError
        One would.
    """
    for method in config.methods:
        for seed in config.seeds:
            folder = run_folder(out, method, seed)
            if not folder.exists():
                continue
            known, wanted = (_comparable(c) for c in (read_toml(folder / "config.toml"), config.resolved(method, seed)))
            differing = sorted(key for key in {*known, *wanted} if known.get(key) != wanted.get(key))
            if differing:
                raise RecordError(
                    f"{folder} holds a run of another configuration (it differs in {', '.join(differing)}): "
                    "choose another --out, or pass --overwrite"
                )


def _comparable(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Settings as flat ``a.b`` keys without nulls, and without those that do not change the result."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _comparable(value, f"{path}{key}.")
        elif value is not None and path + key not in _HOW:
            flat[path + key] = value
    return flat


@dataclass(frozen=True)
class FailedRun:
    """A run that ended before its last round, and why; its rows so far stand in ``<folder>.partial``."""

    folder: Path
    error: FedMergeError


class Outcome(NamedTuple):
    """Folders of the finished runs, and the runs that failed."""

    runs: list[Path]
    failed: list[FailedRun]


def compare(config: Config, out: Path, on_row: Callable[[Row], None]) -> Outcome:
    """Run the whole comparison; methods share partition, initial model and batches of a seed.

    Parameters
    ----------
    config
        What to run.
    out
        Folder for the records, one folder per run.
    on_row
        Called after every round with its row.

    Returns
    -------
    Outcome
        The folders of finished runs, and those that failed: a method that diverges does not stop the others.

    Raises
    ------
    FedMergeError
        Before anything is written, if the data, partition, model or a strategy cannot be made.
    """
    choose_device(config.device)
    experiments = [Experiment(config, seed) for seed in config.seeds]
    for experiment in experiments:
        experiment.check_model()
        for method in config.methods:
            experiment.strategy(method)
    outcome = Outcome([], [])
    with _quiet(config.threads):
        workers = make_workers(config.workers, config.engine)
        try:
            for experiment in experiments:
                for method in config.methods:
                    grid = SimulationGrid(experiment.client_app(), experiment.num_clients, workers=workers)
                    try:
                        outcome.runs.append(run_on_grid(experiment, method, grid, out, on_row))
                    except FedMergeError as error:
                        outcome.failed.append(FailedRun(run_folder(out, method, experiment.seed), error))
        finally:
            workers.close()
    return outcome


def run_on_grid(experiment: Experiment, method: str, grid: Grid, out: Path, on_row: Callable[[Row], None]) -> Path:
    """Run one method on any grid, Flower's own included, and return the folder of its record."""
    config = experiment.config
    measured = MeasuredGrid(grid, keep_trained=config.references)
    strategy = experiment.strategy(method)
    record = RunRecord(run_folder(out, method, experiment.seed), config.resolved(method, experiment.seed))
    record.write_partition(experiment.partition.to_tensors())
    recorder = Recorder(method, experiment, strategy=strategy, grid=measured, record=record, on_row=on_row)
    with _seeded_random(experiment.seed):
        strategy.start(
            grid=measured,
            initial_arrays=experiment.initial_arrays(),
            num_rounds=config.rounds,
            # Strategies that are not ours do not know our seed, and clients must.
            train_config=ConfigRecord({"seed": experiment.seed}),
            evaluate_fn=recorder,
        )
    return record.finish()


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
def _quiet(threads: int) -> Iterator[None]:
    """Keep Flower's log to warnings and torch to its threads while simulating."""
    flower, before = logging.getLogger("flwr"), torch.get_num_threads()
    level = flower.level
    flower.setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        flower.setLevel(level)
        torch.set_num_threads(before)
