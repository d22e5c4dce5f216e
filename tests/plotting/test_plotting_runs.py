from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmerge.errors import RecordError
from fedmerge.plotting import Run, read_runs
from fedmerge.plotting.runs import KEYS


def edit(folder: Path, line: int, **changes: object) -> None:
    """Change keys of one line (counted from 1) of a run; a value of ... removes the key."""
    file = folder / "rounds.jsonl"
    lines = file.read_text().splitlines()
    row = {**json.loads(lines[line - 1]), **changes}
    lines[line - 1] = json.dumps({key: value for key, value in row.items() if value is not ...})
    file.write_text("\n".join(lines) + "\n")


def test_a_comparison_is_read_by_method_then_by_seed(write_run, out):
    for method, seed in (("fednova", 0), ("fedavg+server_adam", 10), ("fedavg+server_adam", 9)):
        write_run(method, seed, [0.1, 0.5])
    runs = read_runs([out])
    assert [(run.method, run.seed) for run in runs] == [
        ("fedavg+server_adam", 9),
        ("fedavg+server_adam", 10),
        ("fednova", 0),
    ]
    assert isinstance(runs[0], Run)
    assert runs[0].folder == out / "fedavg+server_adam-seed9"
    assert [row["test_accuracy"] for row in runs[0].rows] == [0.1, 0.5]


def test_folders_come_in_the_order_given_and_a_run_folder_stands_for_itself(write_run, out):
    single = write_run("zeta", 0, [0.1], out="elsewhere")
    write_run("alpha", 0, [0.1])
    assert [run.method for run in read_runs([single, out])] == ["zeta", "alpha"]


def test_a_folder_named_twice_is_read_once(write_run, out):
    folder = write_run("fedavg", 0, [0.1])
    assert len(read_runs([out, folder, out / ".." / "OUT"])) == 1


def test_one_seed_in_two_places_is_an_error(write_run, out, tmp_path):
    write_run("fedavg", 0, [0.1])
    write_run("fedavg", 0, [0.2], out="second")
    with pytest.raises(RecordError, match=r"fedavg with seed 0 is in .*OUT.* and in .*second.*apart"):
        read_runs([out, tmp_path / "second"])


def test_runs_in_progress_and_other_folders_are_left_out(write_run, out):
    write_run("fedavg", 0, [0.1])
    write_run("fedavg", 1, [0.1]).rename(out / "fedavg-seed1.partial")
    (out / "figures").mkdir()
    (out / "summary.csv").write_text("")
    assert [run.seed for run in read_runs([out])] == [0]


def test_further_keys_blank_lines_and_a_missing_final_newline_are_fine(write_run):
    folder = write_run("fedavg", 0, [0.1, 0.2], client_accuracy=[0.1, 0.9])
    file = folder / "rounds.jsonl"
    file.write_text(file.read_text().replace("\n", "\n\n").rstrip())
    (run,) = read_runs([folder])
    assert [row["client_accuracy"] for row in run.rows] == [[0.1, 0.9], [0.1, 0.9]]


def test_a_diverged_loss_is_no_error(write_run):
    folder = write_run("fedavg", 0, [0.1], test_loss=float("nan"), train_loss=float("inf"))
    assert read_runs([folder])[0].rows[0]["train_loss"] == float("inf")


class TestFolders:
    def test_none_given(self):
        with pytest.raises(RecordError, match="no folder was given"):
            read_runs([])

    def test_missing(self, tmp_path):
        with pytest.raises(RecordError, match=r"nowhere does not exist\. Name the folder"):
            read_runs([tmp_path / "nowhere"])

    def test_a_file(self, tmp_path):
        (tmp_path / "rounds.jsonl").write_text("")
        with pytest.raises(RecordError, match="is a file, not a folder"):
            read_runs([tmp_path / "rounds.jsonl"])

    def test_empty(self, tmp_path):
        with pytest.raises(RecordError, match=r"holds no finished run\. .*fedmerge compare"):
            read_runs([tmp_path])

    def test_only_runs_in_progress(self, write_run, out):
        write_run("fedavg", 0, [0.1]).rename(out / "fedavg-seed0.partial")
        with pytest.raises(RecordError, match="no finished run, only 1 in progress"):
            read_runs([out])

    def test_a_run_in_progress_by_name(self, write_run, out):
        partial = write_run("fedavg", 0, [0.1]).rename(out / "fedavg-seed0.partial")
        with pytest.raises(RecordError, match="is a run in progress"):
            read_runs([partial])

    def test_a_run_that_lost_its_rows_is_not_passed_over(self, write_run, out):
        write_run("fedavg", 0, [0.1])
        (write_run("fedavg", 1, [0.1]) / "rounds.jsonl").unlink()
        with pytest.raises(RecordError, match=r"fedavg-seed1.rounds\.jsonl cannot be read"):
            read_runs([out])


class TestLines:
    def test_no_rows(self, write_run):
        with pytest.raises(RecordError, match=r"rounds\.jsonl has no rows"):
            read_runs([write_run("fedavg", 0, [])])

    def test_not_text(self, write_run):
        folder = write_run("fedavg", 0, [0.1])
        (folder / "rounds.jsonl").write_bytes(b"\xff\xfe")
        with pytest.raises(RecordError, match=r"rounds\.jsonl cannot be read"):
            read_runs([folder])

    def test_a_truncated_last_line(self, write_run):
        folder = write_run("fedavg", 0, [0.1, 0.2, 0.3])
        file = folder / "rounds.jsonl"
        file.write_text(file.read_text()[:-40])
        with pytest.raises(RecordError, match=r"rounds\.jsonl, line 3: the last line is cut off.*Delete this"):
            read_runs([folder])

    def test_a_broken_line_in_the_middle(self, write_run):
        folder = write_run("fedavg", 0, [0.1, 0.2, 0.3])
        file = folder / "rounds.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0], lines[1][:30], lines[2]]))
        with pytest.raises(RecordError, match=r"rounds\.jsonl, line 2: not valid JSON .*Repair"):
            read_runs([folder])

    def test_a_line_that_is_no_object(self, write_run):
        folder = write_run("fedavg", 0, [0.1])
        (folder / "rounds.jsonl").write_text("[1, 2]\n")
        with pytest.raises(RecordError, match="line 1: expected an object, found list"):
            read_runs([folder])

    @pytest.mark.parametrize("key", KEYS)
    def test_a_missing_key(self, write_run, key):
        folder = write_run("fedavg", 0, [0.1, 0.2])
        edit(folder, 2, **{key: ...})
        with pytest.raises(RecordError, match=rf"rounds\.jsonl, line 2: lacks {key}\. .*Run it again"):
            read_runs([folder])

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("method", ""),
            ("seed", 0.0),
            ("round", -1),
            ("round", True),
            ("test_accuracy", 87.5),
            ("test_accuracy", "0.9"),
            ("test_accuracy", float("nan")),
            ("bytes_up", None),
            ("bytes_down", -5),
            ("seconds_merge", float("inf")),
            ("parameters", "1000"),
        ],
    )
    def test_a_value_that_cannot_be_counted_with(self, write_run, key, value):
        folder = write_run("fedavg", 0, [0.1])
        edit(folder, 1, **{key: value})
        with pytest.raises(RecordError, match=rf"line 1: {key} = "):
            read_runs([folder])

    @pytest.mark.parametrize(("key", "value"), [("method", "fednova"), ("seed", 7)])
    def test_two_runs_in_one_file(self, write_run, key, value):
        folder = write_run("fedavg", 0, [0.1, 0.2])
        edit(folder, 2, **{key: value})
        with pytest.raises(RecordError, match=rf"line 2: {key} is .* in the line before"):
            read_runs([folder])

    def test_rounds_out_of_order(self, write_run):
        folder = write_run("fedavg", 0, [0.1, 0.2, 0.3])
        edit(folder, 3, round=1)
        with pytest.raises(RecordError, match="line 3: round 1 comes after round 1"):
            read_runs([folder])
