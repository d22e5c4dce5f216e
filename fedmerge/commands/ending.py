"""Signals that end a command: SIGTERM and SIGHUP are taken as Ctrl-C, and a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Ended", "heeding_signals"]


class Ended(KeyboardInterrupt):
    """A signal that asks the command to end: whatever gives way to Ctrl-C gives way to it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def heeding_signals() -> Iterator[list[int]]:
    """Raise :class:`Ended` in the block where such a signal comes; the list holds its number from then on.

    A second one does what it does without us: the process is gone. A signal that was told to be ignored, as
    ``nohup`` does, stays ignored.
    """
    asked: list[int] = []
    before: dict[int, Any] = {}

    def end(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for caught in before:
            signal.signal(caught, signal.SIG_DFL)
        raise Ended(number)

    if threading.current_thread() is threading.main_thread():  # no other may say what signals do
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # the second is unknown on some systems
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
