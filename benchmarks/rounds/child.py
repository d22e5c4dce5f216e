"""A process that runs one system, a round at a time on command."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Self

import torch

from benchmarks.rounds.task import System, Task
from benchmarks.rounds.usage import Usage
from fedmerge.errors import FedMergeError, UnknownName
from fedmerge.state import State

__all__ = ["SYSTEMS", "Child", "Reading", "find_system"]

SYSTEMS = {"loop": "loop", "stacked": "stacked", "fedmerge": "ours", "fedmerge-ray": "ours"}
"""Systems, and the module of this package whose ``run`` each is."""


class Reading(NamedTuple):
    """What one round took, and CPU time since the process began; the accuracy comes with the last."""

    cpu: float
    wall: float
    cpu_so_far: float
    peak_mib: float
    accuracy: float | None
    engine: str
    data: str


def find_system(name: str) -> System:
    """The function that runs a system.

    Raises
    ------
    UnknownName
        There is none of that name.
    """
    if name not in SYSTEMS:
        raise UnknownName("system", name, SYSTEMS)
    run: System = importlib.import_module(f"benchmarks.rounds.{SYSTEMS[name]}").run
    return run


class Child:
    """One system in a fresh process; use it as a context, which ends the process.

    Parameters
    ----------
    system
        One of :data:`SYSTEMS`.
    task
        What it runs.
    """

    def __init__(self, system: str, task: Task) -> None:
        self.system, self.task = system, task
        self.seconds_to_first_round = 0.0
        self.readings: list[Reading] = []
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, system, task), name=f"bench {system}")
        self._started = time.perf_counter()
        self._process.start()
        theirs.close()  # so that its end shows as the end of the pipe
        self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # A system that still waits for its next round reads the end of the pipe, and cleans up after itself.
        self._connection.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def step(self) -> None:
        """Run the next round."""
        self._connection.send("go")
        reading = self._receive()
        if not self.readings:
            self.seconds_to_first_round = time.perf_counter() - self._started
        self.readings.append(reading)

    def _receive(self) -> Any:
        try:
            said = self._connection.recv()
        except EOFError:
            said = FedMergeError("its process ended without a word")
        if isinstance(said, Exception):
            raise FedMergeError(f"{self.system} on {self.task.workload.name}: {said}") from said
        return said


def _serve(connection: Connection, system: str, task: Task) -> None:
    """Run in the child: report after each round, then wait for the word."""
    torch.set_num_threads(1)
    usage, before = Usage(), (0.0, 0.0)

    def pause(round: int, state: Callable[[], State], engine: str) -> None:
        nonlocal before
        if task.device == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter()
        cpu, peak = usage.read()
        if round == 0:
            connection.send("ready")
        else:
            accuracy = _accuracy(task, state()) if round == task.rounds else None
            spent = cpu - before[0], wall - before[1], cpu
            connection.send(Reading(*spent, peak, accuracy, engine, task.data.name))
        if round < task.rounds:
            connection.recv()
            before = usage.read()[0], time.perf_counter()

    try:
        run = find_system(system)
        logging.getLogger("flwr").setLevel(logging.ERROR)  # only now: Flower sets its own level when imported
        run(task, pause)
    except (EOFError, BrokenPipeError):
        return  # whoever asked is gone
    except Exception as error:
        connection.send(FedMergeError(f"{type(error).__name__}: {error}"))


def _accuracy(task: Task, state: State) -> float:
    return task.accuracy({name: tensor.to(task.device) for name, tensor in state.items()})
