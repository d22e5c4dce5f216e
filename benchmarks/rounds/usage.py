"""CPU time and memory of this process and of all it has started."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from fedmerge.simulation.runs.environment import processor

__all__ = ["Usage", "machine"]


class Usage:
    """Reads CPU time and peak memory of a process tree, Ray's processes included."""

    def __init__(self) -> None:
        self._cpu: dict[psutil.Process, float] = {}
        self._peak: dict[psutil.Process, int] = {}

    def read(self) -> tuple[float, float]:
        """CPU seconds since the start, and MiB at the peak.

        Processes that have ended count with what was last seen of them. The peak is the sum of every process's
        own, so it is exact for one process and a bound from above for several, which share pages and may have
        had their peaks at different times.
        """
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error, OSError):
                times = process.cpu_times()  # to a hundredth of a second, which is little beside a run
                self._cpu[process] = times.user + times.system
                self._peak[process] = _peak_bytes(process)
        peak = _peak_bytes(psutil.Process()) + sum(self._peak.values())
        return time.process_time() + sum(self._cpu.values()), peak / 2**20


def machine() -> str:
    """Cores, processor and torch, for the head of a report.

    Examples
    --------
    >>> "torch" in machine()
    True
    """
    return f"{os.cpu_count()} cores, {processor()}, torch {torch.__version__}"


def _peak_bytes(process: psutil.Process) -> int:
    """Peak resident memory of a process.

    By hand on Linux: psutil knows the peak on Windows only, and getrusage counts what the parent had at the fork.
    """
    if sys.platform == "linux":
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
    memory = process.memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))
