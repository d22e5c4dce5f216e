"""What every fuzzed case has to keep: typed errors only, in little time and little memory."""

from __future__ import annotations

import gc
import logging
import resource
import signal
from collections.abc import Callable
from contextlib import contextmanager

import psutil

from fedmerge import FedMergeError

SECONDS = 10  # of this process's own time: a case that takes more hangs
WAITING = 12  # times as much may pass: a machine has other things to do, and a case that only waits hangs too
GIBIBYTES = 6  # of address space beyond what is taken already: who asks for more gets a MemoryError


class Hangs(BaseException):
    """Raised in a case that takes too long; nothing in the product catches it."""


@contextmanager
def limited(seconds: int = SECONDS):
    """Raise :class:`Hangs` after so long."""

    def late(*_):
        raise Hangs(f"a case took more than {seconds} s")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, WAITING * seconds))
    before = [signal.signal(number, late) for number, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


@contextmanager
def little_memory():
    """Let whatever a forged header claims run into a MemoryError, rather than the machine out of memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + (GIBIBYTES << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def resident() -> float:
    """MiB that this process holds."""
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def fate(case: Callable[[], object], allowed: tuple[type[Exception], ...] = (FedMergeError,)) -> str:
    """Whether a case was ``fine`` or ended with a ``typed`` error; anything else is a failure."""
    try:
        with limited():
            case()
    except allowed as error:
        if str(error):
            return "typed"
        raise AssertionError(f"{type(error).__name__} says nothing") from error
    except Hangs as error:  # Hypothesis takes what is no Exception for a wish to stop
        raise AssertionError(str(error)) from error
    return "fine"


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
