"""Tables that commands show."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fedmerge.api import MethodInfo
from fedmerge.lookup.kinds import KINDS, Kind
from fedmerge.plain_text import one_line
from fedmerge.registry import Entry

__all__ = [
    "kinds_table",
    "methods_table",
    "part_facts",
    "part_text",
    "partition_table",
    "parts_table",
    "show",
    "summary_table",
]


_SENDING = ("aggregator", "refinement")
"""Kinds that have clients send statistics."""

_MAIN = ("final_accuracy_mean", "final_loss_mean")
_WIDE = 100
"""Columns of a terminal from which every column of a table is shown."""


def show(table: Table) -> None:
    """Print a table; a log file gets lines long enough for it."""
    Console(width=_width()).print(table)


def _width() -> int:
    return Console().width if sys.stdout.isatty() or "COLUMNS" in os.environ else 160


def summary_table(rows: Iterable[Mapping[str, Any]], target: float | None) -> Table:
    """The table of a comparison, best method first; on a narrow terminal without what stands in ``summary.csv``."""
    rows = list(rows)
    lasts = {row["rounds"] for row in rows if row["rounds"] is not None}
    losses = _judged_by_loss(rows)
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "method": lambda row: row["method"],
        "seeds": lambda row: str(row["seeds"]),
        "rounds": lambda row: _number(row["rounds"], "g"),
        **_measures(rows),
        "to target" if target is None else f"to {100 * target:g} %": _rounds,
        "MB up": lambda row: _number(row["megabytes_up"], ".2f"),
        "MB down": lambda row: _number(row["megabytes_down"], ".2f"),
        "seconds": lambda row: _number(row["seconds"], ".1f"),
        "failed": lambda row: _number(row["clients_failed"], "d"),
    }
    hidden = {"MB down"} if _width() < _WIDE else set()
    hidden |= {"rounds"} if len(lasts) == 1 else set()
    hidden |= {"failed"} if not any(row["clients_failed"] for row in rows) else set()
    hidden |= {"to target"} if losses else set()
    hidden |= {"seeds"} if _width() < _WIDE and len({row["seeds"] for row in rows}) == 1 else set()
    seeds = max((row["seeds"] for row in rows), default=1)
    over = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    title = f"Test {'loss' if losses else 'accuracy in %'}, {over}"
    title += f"; {_counted(next(iter(lasts)), 'round')}" if len(lasts) == 1 else ""
    notes = [] if target is None else [f"to {100 * target:g} %: rounds until that accuracy"]
    notes += [f"{row['method']} was stopped: {row['stopped']}" for row in rows if row["stopped"]]
    caption = Text(one_line("; ".join(notes), 4000)) if notes else None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in columns:
        if name in hidden:
            continue
        if name == "method":
            table.add_column(name, overflow="fold", min_width=12)
        else:
            table.add_column(name, justify="right", no_wrap=not name.startswith("to "))
    for row in rows:
        table.add_row(*(Text(one_line(text(row))) for name, text in columns.items() if name not in hidden))
    return table


def _judged_by_loss(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is no accuracy, as in a regression."""
    judged = [key for row in rows for key in _MAIN if row.get(key) is not None]
    return "final_accuracy_mean" not in judged and "final_loss_mean" in judged


def _measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    """Columns of accuracy, or loss, and further metrics."""
    if _judged_by_loss(rows):
        columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
            "final": lambda row: _figure(row["final_loss_mean"], row["final_loss_std"]),
            "best": lambda row: _figure(row["best_loss_mean"], None),
        }
    else:
        columns = {
            "final": lambda row: _percent(row["final_accuracy_mean"], row["final_accuracy_std"]),
            "best": lambda row: _percent(row["best_accuracy_mean"], row["best_accuracy_std"]),
        }
    for key in dict.fromkeys(key for row in rows for key in row):
        if key.startswith("final_") and key.endswith("_mean") and key not in _MAIN:
            columns[key.removeprefix("final_").removesuffix("_mean")] = partial(_metric, key)
    return columns


def _counted(number: float, word: str) -> str:
    return f"{number:g} {word}{'' if number == 1 else 's'}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _percent(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def _figure(mean: float | None, deviation: float | None) -> str:
    """A loss or another metric, in its own unit."""
    if mean is None:
        return "-"
    return f"{mean:.4g}" + ("" if deviation is None else f" ± {deviation:.2g}")


def _metric(key: str, row: Mapping[str, Any]) -> str:
    return _figure(row.get(key), row.get(f"{key.removesuffix('_mean')}_std"))


def _rounds(row: Mapping[str, Any]) -> str:
    if row["rounds"] is None:  # a reference, no method
        return "-"
    if row["diverged"] == row["seeds"]:
        return "diverged"
    if row["reached"] is None:
        return "-"
    if row["rounds_to_target"] is None:
        return "never"
    partly = "" if row["reached"] == row["seeds"] else f" ({row['reached']} of {row['seeds']} seeds)"
    return f"{row['rounds_to_target']:.1f}{partly}"


def methods_table(
    methods: Mapping[str, MethodInfo],
    edits: Mapping[str, Entry],
    steps: Mapping[str, Entry],
    refinements: Mapping[str, Entry],
    trajectories: Mapping[str, Entry],
) -> Table:
    """Methods and the parts that go in front and behind, with what they need and their options."""
    table = Table(
        title="Methods; edits go in front, all else behind, as in dare+fedavg+server_momentum+ridge_head+swa",
        title_justify="left",
        caption="`fedmerge methods NAME` tells all about one, its options too.",
        caption_justify="left",
    )
    names = ["name", "what it does", "paper", "clients send besides", "options"]
    if _width() < _WIDE:  # the rest is in --json
        names = names[:2] + names[3:4]
    for name in names:
        widest = 16 if name == "clients send besides" else None
        table.add_column(name, overflow="fold", no_wrap=name in ("name", "paper"), max_width=widest)

    def add(*cells: str) -> None:
        shown = cells if len(names) == len(cells) else (*cells[:2], cells[3])
        table.add_row(*(Text(one_line(cell, 4000)) for cell in shown))

    for info in methods.values():
        needs = [*info.needs, *(["(server data)"] if info.requires_data else [])]
        add(info.name, info.summary, info.paper, ", ".join(needs) or "nothing", _options(info.options))
    for edit in edits.values():
        add(f"{edit.name}+", edit.summary, edit.paper, "nothing", _options(edit.options))
    for step in steps.values():
        usual = f" After fedavg also: {step.alone}." if step.alone else ""
        add(f"+{step.name}", step.summary + usual, step.paper, "nothing", _options(step.options))
    for refinement in refinements.values():
        sums = ", ".join(dict.fromkeys(need.name for need in refinement.cls().needs))
        add(
            f"+{refinement.name}",
            refinement.summary,
            refinement.paper,
            f"{sums}, at the merged model",
            _options(refinement.options),
        )
    for refinement in trajectories.values():
        sends = "losses of models" if refinement.cls.asks else "nothing"
        add(f"+{refinement.name}", refinement.summary, refinement.paper, sends, _options(refinement.options))
    return table


def kinds_table(kinds: Mapping[str, Kind]) -> Table:
    """Kinds of parts by the word for them, and where other packages announce theirs."""
    table = Table(title="`fedmerge list KIND` lists the parts of one kind", title_justify="left")
    for column in ("kind", "entry points of other packages"):
        table.add_column(column)
    for word, kind in kinds.items():
        table.add_row(word, kind.group)
    return table


def parts_table(kind: str, parts: Sequence[Entry]) -> Table:
    """Parts of one kind: what they do, and their options."""
    names = ["name", "what it does", *(["paper"] if any(part.paper for part in parts) else []), "options"]
    names = names if _width() >= _WIDE else [name for name in names if name != "paper"]
    own = "Your own goes by module:name." if KINDS[kind].own else None
    table = Table(title=KINDS[kind].title, title_justify="left", caption=own, caption_justify="left")
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name == "name")
    for part in parts:
        cells = {
            "name": part.name,
            "what it does": part.summary,
            "paper": part.paper,
            "options": _options(part.options),
        }
        table.add_row(*(Text(one_line(cells[name], 4000)) for name in names))
    return table


def part_facts(entry: Entry) -> dict[str, Any]:
    """What ``--json`` tells of a part: options with their defaults, and which have to be given."""
    needed = inspect.Parameter.empty
    return {
        "kind": entry.kind,
        "summary": entry.summary,
        "paper": entry.paper,
        "options": {name: default for name, default in entry.options.items() if default is not needed},
        "required": [name for name, default in entry.options.items() if default is needed],
        "home": f"{entry.cls.__module__}:{entry.cls.__qualname__}",
    }


def part_text(entry: Entry) -> str:
    """Everything about one part: name, paper, defaults, and what its docstring says before the examples."""
    text = (inspect.getdoc(entry.cls) or "").partition("\n\nRaises\n")[0].partition("\n\nExamples\n")[0]
    text = text.replace("\nParameters\n----------", "\nOptions\n-------").replace("``", "")
    needs = ", ".join(need.name for need in entry.cls().needs) if entry.kind in _SENDING else ""
    facts = {"paper": entry.paper, "clients send besides": needs, "defaults": _options(entry.options)}
    lines = [f"{entry.name} ({entry.kind})", *(f"{name}: {fact}" for name, fact in facts.items() if fact), "", text]
    return "\n".join(lines)


def _options(options: Mapping[str, Any]) -> str:
    needed = inspect.Parameter.empty
    texts = (name if value is needed else f"{name}={value}" for name, value in options.items())
    return ", ".join(texts) or "none"


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
        table.add_row(Text(one_line(names[client])), str(total), *labels)
    return table
