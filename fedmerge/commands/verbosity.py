"""How much a command tells, and where log lines go."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from fedmerge.plain_text import CleanLines, one_line

__all__ = ["log_to_terminal", "quiet", "set_verbosity", "tell_error"]

_ERROR = 4000
"""Characters of an error that a terminal is shown: some list what is known."""


class _Terminal(logging.StreamHandler[TextIO]):
    """Writes to whatever standard error is at that moment, so that lines stand above a progress bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.addFilter(CleanLines())  # Flower's lines quote clients too

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def tell_error(error: object, about: str = "") -> None:
    """Show an error on one line of standard error; it may quote a client, a file or a configuration."""
    print(f"error: {one_line(f'{about}{error}', _ERROR)}", file=sys.stderr, flush=True)


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
