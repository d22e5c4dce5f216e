"""How much a command tells, and where log lines go."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

__all__ = ["log_to_terminal", "quiet", "set_verbosity"]


class _Terminal(logging.StreamHandler[TextIO]):
    """Writes to whatever standard error is at that moment, so that lines stand above a progress bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def quiet() -> bool:
    """Whether nothing but results and errors is wanted."""
    return logging.getLogger("fedmerge").getEffectiveLevel() >= logging.ERROR


def log_to_terminal() -> None:
    """Send warnings to the terminal."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_Terminal()], force=True)
    logging.getLogger("fedmerge").setLevel(logging.NOTSET)


def set_verbosity(level: str) -> None:
    """Tell more (``"verbose"``) or less (``"quiet"``)."""
    logging.getLogger("fedmerge").setLevel(logging.INFO if level == "verbose" else logging.ERROR)
