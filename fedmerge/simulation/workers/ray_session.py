"""Ray in this process: started by the first grid that wants it, ended with the last."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from fedmerge.simulation.workers.ray_start import check_address, start_within
from fedmerge.simulation.workers.ray_tensors import share_tensors, stop_sharing

__all__ = ["join", "leave", "search_path"]


class _Session:
    """Who uses Ray. One for the process, as Ray is: threads would start it twice, and one grid end it for another."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.number = 0
        """Of the Ray that runs: one that somebody else has shut down is another."""
        self.users = 0
        self.ours = False
        self.over = threading.Event()
        """Set once a Ray that was started here has ended."""


_SESSION = _Session()


def join(processors: int | None) -> int:
    """Use Ray as it runs, or else start it here or join the cluster that RAY_ADDRESS names.

    Parameters
    ----------
    processors
        CPUs of a Ray that is started here; None for those of the machine.

    Returns
    -------
    int
        What :func:`leave` wants to know.

    Raises
    ------
    WorkersUnavailable
        It neither runs nor can be started, or the cluster cannot be reached.
    """
    with _SESSION.lock:
        if not ray.is_initialized():
            _SESSION.over.set()
            _SESSION.users, _SESSION.over = 0, threading.Event()
            _SESSION.number += 1
            address, began = os.environ.get("RAY_ADDRESS"), time.monotonic()
            if address:
                check_address(address)
            start_within(lambda: _start(processors), _SESSION.over, spent=time.monotonic() - began)
            _SESSION.ours = True
        if not _SESSION.users:
            share_tensors()
        _SESSION.users += 1
        return _SESSION.number


def leave(number: int) -> None:
    """Use Ray no more; it ends with the last user, if it was started here."""
    with _SESSION.lock:
        if number != _SESSION.number:  # its Ray is gone already
            return
        _SESSION.users -= 1
        if _SESSION.users:
            return
        if ray.is_initialized():
            stop_sharing()
            if _SESSION.ours:
                ray.shutdown()
        _SESSION.ours = False
        _SESSION.over.set()


def search_path() -> list[str]:
    """Where this process looks for modules, as a process in another folder has to write it."""
    return [str(Path(entry).absolute()) for entry in sys.path]


def _start(processors: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its reaction to an exhausted GPU count is about to change; ours is to ask for the share we want.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    here: dict[str, Any] = (
        {}
        if os.environ.get("RAY_ADDRESS")
        else {"address": "local", "num_cpus": processors, "include_dashboard": False}
    )
    with _python_path(search_path()):  # workers must find fedmerge itself before they can be told anything
        ray.init(log_to_driver=False, configure_logging=False, **here)


@contextmanager
def _python_path(entries: list[str]) -> Iterator[None]:
    """Processes that are started meanwhile look for modules here too."""
    before = os.environ.get("PYTHONPATH")
    known = [] if not before else before.split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*known, *entries]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
