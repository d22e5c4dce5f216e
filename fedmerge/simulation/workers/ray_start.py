"""Starting Ray, or joining a cluster, within a minute: else an error that says why, and no process of it is left."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray

from fedmerge.errors import WorkersUnavailable
from fedmerge.records.processes import children_of, end_processes, ended_children
from fedmerge.simulation.workers.causes import in_words

__all__ = ["check_address", "start_within"]

_WHOLE = 60.0  # seconds for all of it, an answer of its head and the end of its processes included
_LIMIT = 45.0  # seconds for Ray to start; that takes a few where it can at all
_LOOK = 0.1  # seconds between looks at whether it has
_REACH = 5.0  # seconds for a connection to the head of a cluster
_ANSWER = 25.0  # seconds for its answer, the start of a process that asks included
_END = 5.0  # seconds to end what began

_DEAD = 3.0  # seconds that a process has been dead without Ray's asking for it: what Ray asks for it asks for at once

_LOGS = "the logs under session_latest in Ray's temporary folder, /tmp/ray or RAY_TMPDIR,"
_REMEDY = "mend that, or train in this process with --workers 1"


def check_address(address: str) -> None:
    """Make sure that something answers where RAY_ADDRESS points, and that it is the head of a cluster.

    Ray itself would try for two minutes, and then end this process from within.

    Raises
    ------
    WorkersUnavailable
        Nothing does, or something else.
    """
    where = f"Ray cannot be reached at {address}, which RAY_ADDRESS names"
    remedy = "start it there with `ray start --head`, name another address, or unset RAY_ADDRESS to start Ray here"
    scheme, found, rest = address.rpartition("://")
    host, _, port = rest.partition("/")[0].rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto", "local", or a mistake, about which Ray says soon enough
    try:
        _connect(host.strip("[]"), int(port))
    except (OSError, OverflowError, UnicodeError) as error:
        raise WorkersUnavailable(f"{where}: {in_words(error)}: {remedy}") from error
    if found and scheme:
        return  # Ray's client, which ends by itself
    # Ray's own question, in a process of its own: where it cannot be answered, that one is ended.
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", rest]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_ANSWER, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise WorkersUnavailable(f"{where}: what listens there does not answer as Ray does: {remedy}") from error
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        reason = said[-1].strip() if said else "what listens there does not answer as Ray does"
        raise WorkersUnavailable(f"{where}: {reason}: {remedy}")


def _connect(host: str, port: int) -> None:
    """Connect once. In a thread, for no timeout ends the search for a name that nobody knows."""
    problems: list[BaseException] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=_REACH).close()
        except BaseException as problem:
            problems.append(problem)

    trying = threading.Thread(target=connect, name="fedmerge-ray-connection", daemon=True)
    trying.start()
    trying.join(2 * _REACH)
    if problems:
        raise problems[0]
    if trying.is_alive():
        raise TimeoutError(f"nothing is known of host {host!r} after {2 * _REACH:g} s")


def start_within(start: Callable[[], Any], over: threading.Event, limit: float = _LIMIT, spent: float = 0.0) -> None:
    """Call `start` in a thread that lives until `over`, and wait until Ray runs.

    In a thread, for Linux ends Ray's processes with the thread that started them, and one that simulates may be done
    before others are; and because one that hangs can be left to itself. It fails within a minute, less the seconds
    that are `spent` already.

    Raises
    ------
    WorkersUnavailable
        Ray does not run; whatever it has started has ended, and `over` is set.
    """
    limit, end = min(limit, _WHOLE - spent - 2 * _END), time.monotonic() + _WHOLE - spent
    problems: list[BaseException] = []
    started = threading.Event()
    before, ended = children_of(os.getpid()), ended_children(os.getpid())

    def keep() -> None:
        try:
            start()
        except BaseException as problem:
            problems.append(problem)
        started.set()
        over.wait()

    try:
        with _silent():
            threading.Thread(target=keep, name="fedmerge-ray", daemon=True).start()
            until, dead = time.monotonic() + limit, dict[psutil.Process, float]()
            while not (in_time := started.wait(_LOOK)) and time.monotonic() < until:
                _keep_sigterm()
                dead = {child: dead.get(child, time.monotonic()) for child in ended_children(os.getpid()) - ended}
                if any(time.monotonic() - since > _DEAD for since in dead.values()):
                    raise WorkersUnavailable(
                        f"Ray cannot be started: a process of it ended at once, {_LOGS} may say why: {_REMEDY}"
                    )
        _keep_sigterm()
        if problems:
            problem = problems[0]
            raise WorkersUnavailable(f"Ray cannot be started: {in_words(problem).rstrip('.')}: {_REMEDY}") from problem
        if not in_time:
            raise WorkersUnavailable(f"Ray has not started within {limit:g} s, {_LOGS} may say why: {_REMEDY}")
    except BaseException:  # Ctrl-C as well
        over.set()
        _end_what_began(before, end)
        raise


def _keep_sigterm() -> None:
    """Ray's core takes SIGTERM for a crash, which it reports, and aborts the process soon after: have it end in Python
    as was agreed before.
    """
    if threading.current_thread() is threading.main_thread():  # nobody else may
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _end_what_began(before: set[psutil.Process], end: float) -> None:
    """End processes that were not there before, and be done by `end`, seconds of the monotonic clock."""
    until = min(time.monotonic() + _END, end)
    while time.monotonic() < until:  # one that starts processes may be about to start the next
        begun = children_of(os.getpid()) - before
        if not begun:
            break
        end_processes(begun, max(0.0, min(2.0, until - time.monotonic())))
    if ray.is_initialized():
        # What it would end is gone, for which it may wait long: then it is left to itself.
        leaving = threading.Thread(target=_shut_down, name="fedmerge-ray-end", daemon=True)
        leaving.start()
        leaving.join(max(0.0, min(_END, end - time.monotonic())))


def _shut_down() -> None:
    with suppress(Exception):
        ray.shutdown()


@contextmanager
def _silent() -> Iterator[None]:
    """Ray tells of its trouble in many lines; here it comes as one error."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
