from __future__ import annotations

import csv
import json
import subprocess
import sys
from math import sqrt

import pytest

from fedmerge.commands.conclusion import conclude
from fedmerge.errors import InvalidOption, RecordError
from fedmerge.plotting import read_runs, summarise, write_summary


def test_every_number_by_hand(write_run, out):
    write_run("fedavg", 0, [0.1, 0.6, 0.8, 0.7], clients_failed=1)
    write_run("fedavg", 1, [0.1, 0.5, 0.6, 0.9])
    (row,) = summarise([out], target=0.8)
    assert row == {
        "method": "fedavg",
        "seeds": 2,
        "final_accuracy_mean": pytest.approx(0.8),  # 0.7 and 0.9
        "final_accuracy_std": pytest.approx(0.2 / sqrt(2)),
        "best_accuracy_mean": pytest.approx(0.85),  # 0.8 and 0.9
        "best_accuracy_std": pytest.approx(0.1 / sqrt(2)),
        "rounds_to_target": 2.5,  # rounds 2 and 3
        "reached": 2,
        "megabytes_up": pytest.approx(3.0),  # 3 rounds of 1 MB
        "megabytes_down": pytest.approx(6.0),
        "seconds": pytest.approx(3 * 3.75),
        "seconds_merge": pytest.approx(1.5),
        "parameters": 1000,
        "clients_failed": 4,  # one in each of the four rows of seed 0
        "rounds": 3,
        "diverged": 0,
        "stopped": None,
        "final_loss_mean": pytest.approx(0.2),  # 0.3 and 0.1
        "final_loss_std": pytest.approx(0.2 / sqrt(2)),
        "best_loss_mean": pytest.approx(0.15),  # 0.2 and 0.1
    }


def _without_accuracy(folder, losses, **metrics):
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    rows = [line | {"test_accuracy": None, "test_loss": loss} for line, loss in zip(lines, losses, strict=True)]
    for name, values in metrics.items():
        rows = [row | {f"test_{name}": value} for row, value in zip(rows, values, strict=True)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_runs_without_accuracy_are_ranked_by_their_loss(write_run, out):
    _without_accuracy(write_run("worse", 0, [0, 0, 0]), [9.0, 2.0, 3.0], mae=[3.0, 1.0, 1.5])
    _without_accuracy(write_run("better", 0, [0, 0, 0]), [9.0, 4.0, 1.0], mae=[3.0, 2.0, None])
    _without_accuracy(write_run("lost", 0, [0, 0, 0]), [9.0, 4.0, None], mae=[3.0, 2.0, None])
    rows = {row["method"]: row for row in summarise([out], target=None)}
    assert list(rows) == ["better", "worse", "lost"]
    assert (rows["worse"]["final_loss_mean"], rows["worse"]["best_loss_mean"]) == (3.0, 2.0)
    assert (rows["worse"]["final_mae_mean"], rows["better"]["final_mae_mean"]) == (1.5, 2.0)
    assert [rows[name]["diverged"] for name in rows] == [0, 0, 1]
    assert rows["better"]["final_accuracy_mean"] is None
    table = write_summary(list(rows.values()), out / "summary.csv").read_text().splitlines()
    assert table[0].endswith("final_mae_mean,final_mae_std")
    text = conclude(read_runs([out]))
    assert text.startswith("better ended at a test loss of 1, worse at 3, below it with 1 of 1 seeds")


def test_runs_of_a_task_with_accuracy_and_of_one_without_are_not_compared(write_run, out):
    write_run("fedavg", 0, [0.1, 0.9])
    _without_accuracy(write_run("fednova", 0, [0, 0]), [9.0, 2.0])
    with pytest.raises(RecordError, match="runs of one task"):
        summarise([out], target=None)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_a_run_that_diverged_has_not_reached_the_target(write_run, out, loss):
    write_run("fedavg", 0, [0.1, 0.9, 0.1], test_loss=loss)
    write_run("fedavg", 1, [0.1, 0.2, 0.9])
    (row,) = summarise([out], target=0.9)
    assert (row["rounds_to_target"], row["reached"], row["diverged"]) == (2, 1, 1)


def test_only_seeds_that_reached_the_target_count(write_run, out):
    write_run("fedavg", 0, [0.1, 0.9, 0.2])
    write_run("fedavg", 1, [0.1, 0.2, 0.2])
    (row,) = summarise([out], target=0.9)
    assert (row["rounds_to_target"], row["reached"]) == (1, 1)
    (row,) = summarise([out], target=1.0)
    assert (row["rounds_to_target"], row["reached"]) == (None, 0)
    (row,) = summarise([out], target=None)
    assert (row["rounds_to_target"], row["reached"]) == (None, None)


def test_one_seed_has_no_deviation(write_run, out):
    write_run("fedavg", 0, [0.1, 0.4])
    (row,) = summarise([out], target=None)
    assert (row["seeds"], row["final_accuracy_mean"]) == (1, 0.4)
    assert row["final_accuracy_std"] is None
    assert row["best_accuracy_std"] is None


def test_rounds_without_an_evaluation_cost_but_do_not_score(write_run, out):
    write_run("fedavg", 0, [0.1, None, 0.5, None])
    (row,) = summarise([out], target=0.5)
    assert (row["final_accuracy_mean"], row["rounds_to_target"]) == (0.5, 2)
    assert row["megabytes_up"] == pytest.approx(3.0)


def test_best_first_equal_ones_in_order_of_appearance_unevaluated_last(write_run, out):
    for method, final in (("a", None), ("b", 0.5), ("c", 0.7), ("d", 0.5)):
        write_run(method, 0, [None, final])
    rows = summarise([out], target=None)
    assert [row["method"] for row in rows] == ["c", "b", "d", "a"]
    assert rows[-1]["final_accuracy_mean"] is None
    assert rows[-1]["best_accuracy_mean"] is None


def test_models_that_grow_to_different_widths_give_their_mean(write_run, out):
    write_run("pfnm", 0, [0.1], parameters=1000)
    write_run("pfnm", 1, [0.1], parameters=1001)
    assert summarise([out], target=None)[0]["parameters"] == 1000.5


@pytest.mark.parametrize("target", [90, 0.0, -0.1, float("nan")])
def test_a_target_outside_its_range(write_run, out, target):
    write_run("fedavg", 0, [0.1])
    with pytest.raises(InvalidOption, match=r"For 90 % write 0\.9"):
        summarise([out], target=target)


def test_the_csv_holds_the_rows_and_leaves_nothing_else(write_run, out, tmp_path):
    write_run("fedavg+server_adam", 0, [0.1, 0.4])
    rows = summarise([out], target=None)
    path = tmp_path / "tables" / "summary.csv"
    assert write_summary(rows, path) == path
    with path.open(newline="") as file:
        (read,) = csv.DictReader(file)
    assert list(read) == list(rows[0])
    assert read["method"] == "fedavg+server_adam"
    assert float(read["final_accuracy_mean"]) == 0.4
    assert read["final_accuracy_std"] == ""
    assert [file.name for file in path.parent.iterdir()] == ["summary.csv"]


def test_a_failed_write_keeps_the_old_table(tmp_path):
    path = write_summary([], tmp_path / "summary.csv")
    before = path.read_text()
    assert before.startswith("method,seeds,final_accuracy_mean,")
    with pytest.raises(ValueError, match="typo"):
        write_summary([{"typo": 1}], path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["summary.csv"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"summary\.csv cannot be written"):
        write_summary([], tmp_path / "file" / "summary.csv")


def test_importing_plotting_leaves_matplotlib_out():
    code = "import sys, fedmerge.plotting, fedmerge.plotting.summary; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
