"""Processes of this machine: whether one still runs, which ones another has started, and how to end them."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["children_of", "end_processes", "ended_children", "machine", "start_of"]

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def machine() -> str:
    """What tells this machine, since it was started, from all others; empty where the system does not say."""
    # psutil knows when the machine was started, which two machines may share, and which moves with the clock.
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return ""


def start_of(pid: int) -> str | None:
    """When a process began, in seconds since the machine was started: None where it is gone, empty where nobody tells.

    Examples
    --------
    >>> import os
    >>> start_of(os.getpid()) is None
    False
    """
    try:
        process = psutil.Process(pid)
        # Both are told by the clock: their difference stays when somebody sets it.
        return f"{process.create_time() - psutil.boot_time():.2f}" if _lives(process) else None
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # no process can have that number
        return None
    except psutil.AccessDenied:  # another person's
        return ""


def children_of(pid: int) -> set[psutil.Process]:
    """Processes that one has started, and theirs, as far as they run: each knows when it began."""
    return {child for child in psutil.Process(pid).children(recursive=True) if _lives(child)}


def ended_children(pid: int) -> set[psutil.Process]:
    """Processes that one has started, which have ended, and of which it has not asked yet how."""
    return {child for child in psutil.Process(pid).children() if not _lives(child)}


def end_processes(processes: Collection[psutil.Process], patience: float = 2.0) -> None:
    """Kill processes, but none that has got the number of one of them since, and wait until they are gone."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    # Not psutil.wait_procs: it would learn how they ended, which whoever started them then cannot.
    until = time.monotonic() + patience
    while any(_lives(process) for process in processes) and time.monotonic() < until:
        time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended is listed until its parent asks how."""
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
