"""What clients, replies, files and configurations say reaches terminals, plots and records as text and nothing else."""

from __future__ import annotations

import json
import logging
import sys

import numpy as np
import pytest
from flwr.app import Error, Message
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress as Bars

from fedmerge import cli
from fedmerge.commands import progress, tables
from fedmerge.commands.progress import Progress
from fedmerge.errors import BadUpdate, ClientFailed, NoUsableUpdates
from fedmerge.plain_text import both_ends, cut_within, one_line, plain
from fedmerge.plotting import plot_convergence, plot_partition, plot_traffic, read_runs
from fedmerge.plotting.summary import COLUMNS
from fedmerge.records.run_records import RunRecord
from fedmerge.strategies import MergeStrategy
from fedmerge.strategies.failures import failed_client
from tests.federation import initial, noisy_states, reply

HOSTILE = {
    "colours": "\x1b[31mred\x1b[0m",
    "clears the screen": "\x1b[2J\x1b[H",
    "sets the title": "\x1b]0;owned\x07",
    "C1 controls": "\x9b31m\x85",
    "returns": "all is well\rERROR",
    "deletes": "ERROR\b\b\b\b\bfine",
    "more lines": "one\nINFO: client 3 is fine\n\nINFO: so is 4",
    "separators": "one\u2028two\u2029three",
    "turned around": "\u202egpj.exe\u2066x\u2069",
    "not seen": "a\u200b\u200d\ufeff\u00adb",
    "half a character": "\ud800x",
    "markup": "[red]x[/red][link=file:///etc]y[/link][/]",
    "formula": "$\\frac{1$ and $x^$",
    "percent": "%s %d %(x)s {0} {x}",
    "long": "y" * 10_000_000,
    "nul": "\0",
}


def by_node(node, claimed):
    """Nobody is believed."""
    return f"on node {node}", False


def harmless(text: str, longest: int = 5000) -> bool:
    return plain(text) == text and len(text) <= longest


@given(st.text())
def test_what_is_left_of_any_text_is_seen_moves_nothing_and_stays(text):
    clean = one_line(text)
    assert clean.isprintable()
    assert one_line(clean) == clean
    clean.encode()  # no halves of characters


@pytest.mark.parametrize("kind", HOSTILE)
def test_reasons_of_clients_are_one_short_line_in_errors_and_the_log(kind, caplog):
    text = HOSTILE[kind]
    for error in (BadUpdate(3, text, "Mend it."), ClientFailed(3, 1, text), failed_client(3, text, 1, by_node)):
        assert harmless(error.reason, 600)
        assert harmless(str(error), 800)
    with caplog.at_level(logging.WARNING, "fedmerge"):
        logging.getLogger("fedmerge").warning("client %s: %s", text, text)
    assert harmless(caplog.messages[0])


@pytest.mark.parametrize("kind", HOSTILE)
def test_error_replies_of_clients_reach_log_and_error_clean(kind, caplog):
    messages = [reply(node, state, 8) for node, state in zip((2, 3), noisy_states(), strict=False)]
    failing = reply(4, noisy_states(1)[0], 8)
    failing = Message(Error(code=2, reason=HOSTILE[kind]), reply_to=failing)
    strategy = MergeStrategy()
    strategy.aggregate_train(1, [*messages, failing])
    assert all(harmless(message) for message in caplog.messages)
    assert harmless(strategy.last_report.failed[0].reason, 600)
    with pytest.raises(NoUsableUpdates) as ended:
        MergeStrategy().aggregate_train(1, [failing])
    assert harmless(str(ended.value), 2500)


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_of_tensors_that_a_client_makes_up_reach_the_log_clean(kind, caplog):
    states = noisy_states()
    states[1] = {**states[1], HOSTILE[kind].replace("\ud800", "") or "x": next(iter(states[1].values()))}
    messages = [reply(node, state, 8) for node, state in zip((2, 3, 4), states, strict=True)]
    strategy = MergeStrategy()
    strategy.configure_train(1, initial(), __import__("flwr").app.ConfigRecord(), _Grid())
    strategy.aggregate_train(1, messages)
    assert len(strategy.last_report.dropped) == 1
    assert all(harmless(message) for message in caplog.messages)


class _Grid:
    def get_node_ids(self):
        return [2, 3, 4]


@pytest.mark.parametrize("reason", ["client " + "9" * 6000 + ": x", "<class 'x'>:<'" + "'>:<'" * 1_000_000 + "x"])
def test_reasons_made_to_take_time_or_to_be_no_number_do_neither(reason):
    assert harmless(failed_client(3, reason, 1, by_node).reason, 600)


def test_a_long_traceback_still_tells_what_was_raised():
    text = "Traceback (most recent call last):\n" + '  File "x.py", line 1\n' * 100_000 + "KeyError: 'x'"
    assert failed_client(5, text, 1, by_node).reason == "KeyError: 'x'"
    assert len(both_ends(text)) < 30_000


def test_records_keep_what_was_said_escaped_and_cut(tmp_path):
    record = RunRecord(tmp_path / "run", {})
    said = {"failures": [{"client": 1, "reason": text} for text in HOSTILE.values()], "skipped": "z" * 10_000_000}
    record.append({"round": 0, **said})
    line = (record.partial / "rounds.jsonl").read_bytes()
    assert len(line) < 20_000
    assert line.count(b"\n") == 1
    assert line[:-1].decode("ascii").isprintable()
    (row,) = record.rows()
    assert [one["reason"][:20] for one in row["failures"]] == [text[:20] for text in HOSTILE.values()]


def test_keys_are_cut_as_values_are():
    assert cut_within({"k" * 9: ("v" * 9, 1.5, None)}, 4) == {
        "kkkk... (5 more characters)": ["vvvv... (5 more characters)", 1.5, None]
    }


def row_of(round: int, **told):
    counts = dict.fromkeys(("clients_ok", "clients_failed", "bytes_down", "bytes_up", "parameters"), 1)
    seconds = dict.fromkeys(("seconds_train", "seconds_merge", "seconds_evaluate"), 0.1)
    return {
        "method": "fedavg", "seed": 0, "round": round, "test_loss": 1.0, "test_accuracy": 0.5, "train_loss": 1.0,
        **counts, **seconds, **told,
    }  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_progress_shows_reasons_as_text_on_a_terminal_and_in_a_file(kind, monkeypatch, capsys):
    row = row_of(1, skipped=HOSTILE[kind], method=HOSTILE[kind])
    Progress(2, 1)(row)
    (line,) = capsys.readouterr().out.splitlines()
    assert harmless(line, 700)
    shown = []

    def bars(*columns, console):
        made = Bars(*columns, console=Console(force_terminal=True, width=4000, file=sys.stderr))
        shown.append(made)
        return made

    monkeypatch.setattr(progress, "Bars", bars)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    told = Progress(2, 1)
    told(row)
    console = Console(width=4000)
    with console.capture() as capture:
        console.print(shown[0].get_renderable())
    said = capture.get()
    if kind == "markup":
        assert "[red]x[/red][link=file:///etc]y[/link][/]" in said
    assert harmless(said.replace("\n", ""))


@pytest.mark.parametrize("kind", HOSTILE)
def test_tables_show_names_as_text(kind):
    row = {**dict.fromkeys(COLUMNS, 1), "method": HOSTILE[kind]}
    console = Console(width=300)
    with console.capture() as capture:
        console.print(tables.summary_table([row], None))
        import torch

        console.print(tables.partition_table(torch.ones(1, 2, dtype=torch.int64), [HOSTILE[kind]], 0))
    said = capture.get()
    assert all(harmless(line) for line in said.splitlines())
    if kind == "markup":
        assert said.count("[link=file:///etc]") == 3  # in both tables, and in the note of who was stopped


@pytest.mark.parametrize("kind", ["colours", "more lines", "turned around", "formula", "markup", "long"])
def test_pictures_and_commands_show_names_of_records_as_text(kind, tmp_path, monkeypatch, capsys):
    run = tmp_path / "c" / "run"
    run.mkdir(parents=True)
    rows = [row_of(round, method=HOSTILE[kind], references={HOSTILE[kind]: 0.4} if round else {}) for round in (0, 1)]
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert harmless(read_runs([tmp_path / "c"])[0].method, 600)
    plot_convergence([tmp_path / "c"], tmp_path / "a.svg")
    plot_traffic([tmp_path / "c"], tmp_path / "b.svg")
    plot_partition(
        np.ones((2, 2)), tmp_path / "p.svg", class_names=[HOSTILE[kind], "b"], client_names=[HOSTILE[kind], "b"]
    )
    rows[1]["method"] = HOSTILE[kind] + "other"
    rows[0]["method"] = HOSTILE[kind] * (kind != "long") or "x"
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["fedmerge", "plot", str(tmp_path / "c")])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert harmless(err[:-1])
