"""What every fuzzed case has to keep: typed errors only, in little time and little memory."""

from __future__ import annotations

import gc
import logging
import resource
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedmerge import FedMergeError

SECONDS = 10  # a case that takes longer hangs
GIBIBYTES = 6  # of address space beyond what is taken already: who asks for more gets a MemoryError


class Hangs(BaseException):
    """Raised in a case that takes too long; nothing in the product catches it."""


@contextmanager
def limited(seconds: int = SECONDS):
    """Raise :class:`Hangs` after so long."""

    def late(*_):
        raise Hangs(f"a case took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def little_memory():
    """Let whatever a forged header claims run into a MemoryError, rather than the machine out of memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:  # noqa: PTH123
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (GIBIBYTES << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def resident() -> float:
    """MiB that this process holds."""
    gc.collect()
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


@dataclass
class Tally:
    """What became of many cases."""

    fine: int = 0
    typed: int = 0
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        """How many there were."""
        return self.fine + self.typed + len(self.wrong)

    def add(self, name: str, case: Callable[[], object], allowed: tuple[type[Exception], ...] = (FedMergeError,)):
        """Run one."""
        begin = time.perf_counter()
        try:
            with limited():
                case()
            self.fine += 1
        except allowed as error:
            self.typed += 1
            if not str(error):
                self.wrong.append(f"{name}: {type(error).__name__} that says nothing")
        except (Exception, Hangs) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "/fedmerge/" in f.filename]
            place = f"{ours[-1].filename.rpartition('/fedmerge/')[2]}:{ours[-1].lineno}" if ours else where.filename
            self.wrong.append(f"{name}: {type(error).__name__}: {str(error)[:200]} at {place}")
        took = time.perf_counter() - begin
        self.slowest, self.seconds = max(self.slowest, took), self.seconds + took


@contextmanager
def quiet():
    """Nothing on the screen: every dropped client is a warning."""
    loggers = [logging.getLogger(name) for name in ("fedmerge", "flwr")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
