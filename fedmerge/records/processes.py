"""Processes of this machine: whether one still runs, which ones another has started, and how to end them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["children_of", "end_processes", "ended_children", "machine", "start_of"]

_PROCESSES = Path("/proc")
_ENDED = "ZX"
"""States of a process that has ended, and whose parent has not asked yet how."""


def machine() -> str:
    """What tells this machine, since it was started, from all others; empty where the system does not say."""
    with suppress(OSError):
        return (_PROCESSES / "sys/kernel/random/boot_id").read_text().strip()
    return ""


def start_of(pid: int) -> str | None:
    """When a process began, in the system's own count: None where it is gone, empty where nobody tells.

    Examples
    --------
    >>> start_of(os.getpid()) is None
    False
    """
    if not 0 < pid < 2**31:
        return None
    if (_PROCESSES / "self/stat").exists():
        facts = _facts(pid)
        return None if facts is None or facts[0] in _ENDED else facts[19]
    if os.name == "nt":  # there, the signal 0 is Ctrl-C
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another person's
        return ""
    return ""


def _facts(pid: int) -> list[str] | None:
    """State, parent and so on; the name of the program, which stands before them, may hold anything."""
    try:
        return (_PROCESSES / str(pid) / "stat").read_bytes().rpartition(b")")[2].decode("ascii").split()
    except OSError:
        return None


def children_of(pid: int) -> dict[int, str]:
    """Processes that one has started, and theirs, with when they began."""
    parents: dict[int, list[tuple[int, str]]] = {}
    if _PROCESSES.exists():
        for entry in _PROCESSES.iterdir():
            facts = _facts(int(entry.name)) if entry.name.isdecimal() else None
            if facts is not None and facts[0] not in _ENDED:
                parents.setdefault(int(facts[1]), []).append((int(entry.name), facts[19]))
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for child, began in parents.get(waiting.pop(), []):
            if child not in found:
                found[child] = began
                waiting.append(child)
    return found


def ended_children(pid: int) -> set[tuple[int, str]]:
    """Processes that one has started, which have ended, and of which it has not asked yet how: number and beginning."""
    if not _PROCESSES.exists():
        return set()
    entries = [entry.name for entry in _PROCESSES.iterdir() if entry.name.isdecimal()]
    found = ((int(name), _facts(int(name))) for name in entries)
    return {(one, facts[19]) for one, facts in found if facts and facts[0] in _ENDED and int(facts[1]) == pid}


def end_processes(processes: Iterable[tuple[int, str]], patience: float = 2.0) -> None:
    """Kill processes, each the one that began at that time, and wait until they are gone."""
    left = dict(processes)
    for pid, began in left.items():
        if start_of(pid) == began:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + patience
    while any(start_of(pid) == began for pid, began in left.items()) and time.monotonic() < until:
        time.sleep(0.02)
