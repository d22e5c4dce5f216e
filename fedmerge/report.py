"""What the command shows on a terminal: tables and progress."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from torch import Tensor

from fedmerge.api import MethodInfo
from fedmerge.registry import Entry

__all__ = ["Progress", "interruptible", "methods_table", "partition_table", "show", "summary_table"]


def show(table: Table) -> None:
    """Print a table; a log file gets lines long enough for it."""
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@contextmanager
def interruptible(folder: Path) -> Iterator[None]:
    """Let Ctrl-C end the command with a word on how to go on in `folder`, and the exit code that shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"the round under way is given up, all before it is kept: `fedmerge resume {folder}` goes on"
        print(f"interrupted: {kept if folder.exists() else 'nothing was begun'}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


class Progress:
    """A bar over all rounds of all runs; one line a round where the output is no terminal."""

    def __init__(self, rounds: int, runs: int) -> None:
        self._rounds, self._runs = rounds, runs
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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
        text += f"  test {100 * row['test_accuracy']:.2f} %"
        if row.get("skipped"):
            text += f"  skipped: {row['skipped']}"
        elif row["clients_failed"]:
            text += f"  {row['clients_failed']} of {row['clients_ok'] + row['clients_failed']} clients failed"
        if self._bars is None or self._task is None:
            loss = "" if row["train_loss"] is None else f"  train loss {row['train_loss']:.4f}"
            print(f"{text}{loss}", flush=True)
        else:
            self._bars.update(self._task, description=text, advance=1 if row["round"] else 0)


def summary_table(rows: Iterable[Mapping[str, Any]], target: float | None) -> Table:
    """The table of a comparison, best method first."""
    table = Table(title="Test accuracy in %, mean and standard deviation over seeds", title_justify="left")
    reach = "rounds to target" if target is None else f"rounds to {100 * target:g} %"
    for name in ("method", "seeds", "final", "best", reach, "MB up", "MB down", "seconds", "clients failed"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        if row["parameters"] is None:  # a reference, no method
            final = _percent(row["final_accuracy_mean"], row["final_accuracy_std"])
            table.add_row(row["method"], str(row["seeds"]), final, *["-"] * 6)
            continue
        table.add_row(
            row["method"],
            str(row["seeds"]),
            _percent(row["final_accuracy_mean"], row["final_accuracy_std"]),
            _percent(row["best_accuracy_mean"], row["best_accuracy_std"]),
            _rounds(row),
            f"{row['megabytes_up']:.2f}",
            f"{row['megabytes_down']:.2f}",
            f"{row['seconds']:.1f}",
            str(row["clients_failed"]),
        )
    return table


def _percent(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def _rounds(row: Mapping[str, Any]) -> str:
    if row["rounds_to_target"] is None:
        return "not reached"
    partly = "" if row["reached"] == row["seeds"] else f" ({row['reached']} of {row['seeds']} seeds)"
    return f"{row['rounds_to_target']:.1f}{partly}"


def methods_table(
    methods: Mapping[str, MethodInfo], steps: Mapping[str, Entry], refinements: Mapping[str, Entry]
) -> Table:
    """Methods, server steps and refinements with what they need and their options."""
    table = Table(
        title="Methods; server steps and refinements go behind, as in fedavg+ridge_head", title_justify="left"
    )
    for name in ("name", "what it does", "paper", "clients send besides", "options"):
        table.add_column(name, overflow="fold")
    for info in methods.values():
        needs = [*info.needs, *(["(server data)"] if info.requires_data else [])]
        table.add_row(info.name, info.summary, info.paper, ", ".join(needs) or "nothing", _options(info.options))
    for step in steps.values():
        table.add_row(f"+{step.name}", step.summary, step.paper, "nothing", _options(step.options))
    for one in refinements.values():
        sums = ", ".join(dict.fromkeys(need.name for need in one.cls().needs))
        table.add_row(f"+{one.name}", one.summary, one.paper, f"{sums}, at the merged model", _options(one.options))
    return table


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "none"


def partition_table(counts: Tensor, names: Sequence[str], seed: int) -> Table:
    """Examples of every client, and its commonest label where examples have one each."""
    table = Table(title=f"Training examples by client, seed {seed}", title_justify="left")
    labelled = counts.shape[1] > 1
    for column in ("client", "examples", *(("labels", "commonest label") if labelled else ())):
        table.add_column(column, justify="left" if column == "client" else "right")
    for client, row in enumerate(counts):
        total, most = int(row.sum()), int(row.argmax())
        share = 100 * int(row[most]) / total if total else 0
        labels = (str(int((row > 0).sum())), f"{most} ({share:.0f} %)") if labelled else ()
        table.add_row(names[client], str(total), *labels)
    return table
