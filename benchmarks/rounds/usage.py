"""CPU time and memory of this process and of all it has started."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import torch

from fedmerge.simulation.runs.environment import processor

__all__ = ["Usage", "machine"]

_PROC = Path("/proc")


class Usage:
    """Reads CPU time and peak memory of a process tree.

    On Linux it looks into /proc, so that Ray's processes count; elsewhere it sees this process only.
    """

    def __init__(self) -> None:
        self._cpu: dict[int, float] = {}
        self._peak: dict[int, int] = {}

    def read(self) -> tuple[float, float]:
        """CPU seconds since the start, and MiB at the peak.

        Processes that have ended count with what was last seen of them. The peak is the sum of every process's
        own, so it is exact for one process and a bound from above for several, which share pages and may have
        had their peaks at different times.
        """
        for pid in _descendants():
            with suppress(OSError):
                # The clock that clock_getcpuclockid(3) names: all threads, to the nanosecond.
                self._cpu[pid] = time.clock_gettime((~pid << 3) | 2)
                self._peak[pid] = _peak_kib(pid)
        own = _peak_kib(os.getpid()) if _PROC.is_dir() else _own_peak_kib()
        return time.process_time() + sum(self._cpu.values()), (own + sum(self._peak.values())) / 1024


def machine() -> str:
    """Cores, processor and torch, for the head of a report.

    Examples
    --------
    >>> "torch" in machine()
    True
    """
    return f"{os.cpu_count()} cores, {processor()}, torch {torch.__version__}"


def _descendants() -> list[int]:
    """Processes below this one."""
    if not _PROC.is_dir():
        return []
    children = defaultdict(list)
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                # The name stands in parentheses and may hold blanks; the parent is the second field after it.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children[parent].append(int(entry.name))
    found, waiting = [], [os.getpid()]
    while waiting:
        below = children[waiting.pop()]
        found += below
        waiting += below
    return found


def _peak_kib(pid: int) -> int:
    """Peak resident memory; getrusage would count what the parent had when it forked."""
    for line in (_PROC / str(pid) / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def _own_peak_kib() -> int:
    import resource  # noqa: PLC0415 - not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak
