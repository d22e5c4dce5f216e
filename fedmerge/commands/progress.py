"""Progress of runs on a terminal, and what Ctrl-C says."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from fedmerge.commands.ending import Ended
from fedmerge.commands.verbosity import quiet
from fedmerge.plain_text import one_line

__all__ = ["Progress", "interruptible"]


@contextmanager
def interruptible(folder: Path) -> Iterator[None]:
    """Let Ctrl-C, or a signal that is taken as such, end the command with a word on how to go on in `folder`, and the
    exit code that shells expect.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, Ended) else signal.SIGINT
        kept = f"the round under way is given up, all before it is kept: `fedmerge resume {folder}` goes on"
        with suppress(OSError):  # the terminal may be gone, which is what SIGHUP says
            print(f"interrupted: {kept if folder.exists() else 'nothing was begun'}", file=sys.stderr, flush=True)
        raise SystemExit(128 + number) from None


def _judged(row: Mapping[str, Any]) -> str:
    """The accuracy, or the loss where there is none."""
    accuracy, loss = row["test_accuracy"], row["test_loss"]
    if accuracy is not None and math.isfinite(accuracy):
        return f"{100 * accuracy:.2f} %"
    return "diverged" if loss is None or not math.isfinite(loss) else f"loss {loss:.4g}"


class Progress:
    """A bar over all rounds of all runs; one line a round where the output is no terminal."""

    def __init__(self, rounds: int, runs: int) -> None:
        self._rounds, self._runs = rounds, runs
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        if sys.stderr.isatty() and not quiet():
            # No markup: what a client calls a reason is not to colour the screen, nor to be a mistake in it.
            description = TextColumn("{task.description}", markup=False)
            columns = (description, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bars = Bars(*columns, console=Console(stderr=True))
            self._task = self._bars.add_task("starting", total=rounds * runs)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Show one more round."""
        text = f"{row['method']} seed {row['seed']} round {row['round']}/{self._rounds}"
        text += f"  test {_judged(row)}"
        if row.get("skipped"):
            text += f"  skipped: {row['skipped']}"
        elif row["clients_failed"]:
            text += f"  {row['clients_failed']} of {row['clients_ok'] + row['clients_failed']} clients failed"
        if row.get("stopped"):
            text += f"  stopped: {row['stopped']}"
        text = one_line(text)  # a reason may quote what a client says
        if self._bars is None or self._task is None:
            loss = "" if row["train_loss"] is None else f"  train loss {row['train_loss']:.4f}"
            if not quiet():
                print(f"{text}{loss}", flush=True)
        else:
            left = self._rounds - row["round"] if row.get("stopped") else 0  # which nobody is going to run
            self._bars.update(self._task, description=text, advance=left + (1 if row["round"] else 0))
