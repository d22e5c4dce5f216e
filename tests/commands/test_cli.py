"""The command, as a person runs it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest
import torch

from fedmerge import __version__, cli
from fedmerge.plotting import read_runs

SMALL = ["--rounds", "1", "--clients", "3", "--model", "logistic", "--methods", "fedavg"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every command runs in a folder of its own, with no data folder named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDMERGE_DATA", raising=False)
    return tmp_path


def fedmerge(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of one command."""
    monkeypatch.setattr(sys, "argv", ["fedmerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    captured = capsys.readouterr()
    return done.value.code or 0, captured.out, captured.err


def test_compare_leaves_table_pictures_and_records(monkeypatch, capsys, tmp_path):
    code, out, _ = fedmerge(monkeypatch, capsys, "compare", *SMALL, "--seeds", 2, "--out", "o")
    assert code == 0
    assert "fedavg seed 1 round 1/1" in out
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert names == {
        "summary.csv", "convergence.png", "traffic.png", "partition.png", "partition.safetensors",
        "fedavg-seed0", "fedavg-seed1",
    }  # fmt: skip
    assert all(f"o/{name}" in out for name in ("summary.csv", "convergence.png", "partition.png"))


def test_compare_again_keeps_what_is_finished_and_refuses_other_federations(monkeypatch, capsys):
    command = ("compare", *SMALL, "--out", "o")
    assert fedmerge(monkeypatch, capsys, *command)[0] == 0
    assert fedmerge(monkeypatch, capsys, *command)[0] == 0
    code, _, err = fedmerge(monkeypatch, capsys, *command, "--alpha", 5)
    assert code == 2
    assert "--overwrite" in err
    assert fedmerge(monkeypatch, capsys, *command, "--alpha", 5, "--overwrite")[0] == 0


def test_default_folder_lies_under_runs(monkeypatch, capsys, tmp_path):
    assert fedmerge(monkeypatch, capsys, "compare", *SMALL)[0] == 0
    assert (tmp_path / "runs" / "digits-logistic-dirichlet0.3" / "summary.csv").exists()


def test_run_repeats_a_record(monkeypatch, capsys, tmp_path):
    fedmerge(monkeypatch, capsys, "compare", *SMALL, "--out", "a")
    assert fedmerge(monkeypatch, capsys, "run", "a/fedavg-seed0/config.toml", "--out", "b")[0] == 0

    def accuracies(folder):
        lines = (tmp_path / folder / "fedavg-seed0" / "rounds.jsonl").read_text().splitlines()
        return [json.loads(line)["test_loss"] for line in lines]

    assert accuracies("a") == accuracies("b")


def test_run_wants_one_method_and_one_seed(monkeypatch, capsys, tmp_path):
    (tmp_path / "c.toml").write_text('methods = ["fedavg", "fedatt"]\n')
    code, _, err = fedmerge(monkeypatch, capsys, "run", "c.toml")
    assert code == 2
    assert "2 methods" in err


def test_resume_finishes_what_was_begun_and_draws_it(monkeypatch, capsys, tmp_path):
    fedmerge(monkeypatch, capsys, "compare", *SMALL, "--methods", "fedavg,fedatt", "--out", "a")
    before = (tmp_path / "a" / "fedavg-seed0" / "rounds.jsonl").read_bytes()
    # As a kill leaves it: one run finished, one begun.
    (tmp_path / "a" / "fedatt-seed0").rename(tmp_path / "a" / "fedatt-seed0.partial")
    for name in ("summary.csv", "convergence.png"):
        (tmp_path / "a" / name).unlink()
    code, out, _ = fedmerge(monkeypatch, capsys, "resume", "a")
    assert code == 0
    assert "a/summary.csv" in out
    assert (tmp_path / "a" / "summary.csv").read_text().count("\n") == 3
    assert (tmp_path / "a" / "fedavg-seed0" / "rounds.jsonl").read_bytes() == before
    code, out, _ = fedmerge(monkeypatch, capsys, "resume", "a/fedatt-seed0")
    assert (code, out.split()) == (0, ["a/fedatt-seed0"])


def test_plot_draws_finished_runs(monkeypatch, capsys, tmp_path):
    fedmerge(monkeypatch, capsys, "compare", *SMALL, "--out", "a")
    code, out, _ = fedmerge(monkeypatch, capsys, "plot", "a", "--out", "again.png", "--target", 0.5)
    assert code == 0
    assert (tmp_path / "again.png").stat().st_size > 10_000
    assert "again.png" in out


def test_partition_shows_and_saves(monkeypatch, capsys, tmp_path):
    code, out, _ = fedmerge(monkeypatch, capsys, "partition", "--out", "p", "--clients", 4, "--alpha", 5)
    assert code == 0
    assert "client-3" in out
    assert "client-4" not in out
    assert "commonest label" in out
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"partition.png", "partition.safetensors"}


def test_methods_lists_what_there_is(monkeypatch, capsys):
    code, out, _ = fedmerge(monkeypatch, capsys, "methods", "--json")
    listed = json.loads(out)
    assert code == 0
    assert listed["fednova"]["needs"] == ["local_steps"]
    assert listed["fedatt"]["options"]["step_size"] == 1.2
    code, out, _ = fedmerge(monkeypatch, capsys, "methods")
    assert "+server_adam" in out


MISTAKES = {
    "unknown method": (["compare", "--methods", "fedvag"], "Did you mean 'fedavg'"),
    "unknown step": (["compare", "--methods", "fedavg+adam"], "server_adam"),
    "unknown data set": (["compare", "--dataset", "minst"], "mnist"),
    "unknown model": (["compare", "--model", "lenett"], "lenet"),
    "unknown key": (["compare", "--set", "training.epoch=1"], "Did you mean 'training.epochs'"),
    "unknown option": (["compare", "--set", "options.fedatt.norms=1"], "Did you mean 'norm'"),
    "option of a wrong type": (["compare", "--set", "options.fednova.server_momentum=high"], "server_momentum"),
    "missing data folder": (["compare", "--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
    "missing file": (["compare", "nowhere.toml"], "nowhere.toml"),
    "corrupt TOML": (["compare", "corrupt.toml"], "corrupt.toml is not valid TOML"),
    "unknown key in TOML": (["compare", "key.toml"], "Did you mean 'rounds'"),
    "client without examples": (["compare", "--clients", "700", "--alpha", "0.01"], "client"),
    "more clients than examples": (["compare", "--clients", "99999"], "clients"),
    "user's model is missing": (["compare", "--model", "nowhere:net"], "nowhere"),
    "user's model does not fit": (
        ["compare", "--model", "its_models:wants_three"],
        "cannot take a batch of shape [2, 1, 8, 8]",
    ),
    "user's model has too few classes": (["compare", "--model", "its_models:two_classes"], "logits of shape [2, 10]"),
    "no such strategy": (["compare", "--methods", "nowhere:Strategy"], "nowhere:Strategy"),
    "target in percent": (["compare", "--target", "90"], "target"),
    "workers": (["compare", "--workers", "many"], "workers"),
    "device": (["compare", "--device", "tpu9"], "device"),
    "assignment": (["compare", "--set", "rounds"], "key=value"),
    "nothing to resume": (["resume", "nowhere"], "nowhere does not exist"),
    "no run to resume": (["resume", "."], "holds no run"),
    "nothing to plot": (["plot", "nowhere"], "nowhere"),
    "data set without its flag": (["compare", "digits"], "--dataset digits"),
    "model without its flag": (["compare", "lenet"], "--model lenet"),
    "methods with a blank": (["compare", "--methods", "fedavg", "fednova"], "--methods fedavg,fednova"),
    "methods with a blank in quotes": (["compare", "--methods", "fedavg fednova"], "commas: fedavg,fednova"),
    "a method twice": (["compare", "--methods", "fedavg,fednova,fedavg"], "'fedavg' twice"),
    "refinement alone": (["compare", "--methods", "ridge_head"], "fedavg+ridge_head"),
    "nothing behind a plus": (["compare", "--methods", "fedavg+"], "fedavg+server_adam"),
    "option behind a colon": (["compare", "--methods", "fedfisher:diag"], "fedfisher(option=value)"),
    "Flower's strategy with a dot": (["compare", "--methods", "flwr.serverapp.FedAvg"], "flwr.serverapp:FedAvg"),
    "Flower's older strategy": (["compare", "--methods", "flwr.server.strategy:FedAvg"], "flwr.serverapp.strategy"),
    "capitals": (["compare", "--dataset", "MNIST"], "Did you mean 'mnist'"),
    "a folder as configuration": (["compare", "."], "is a folder"),
    "a file as run": (["resume", "key.toml"], "is a file"),
    "usual name of a setting": (["compare", "--set", "training.lr=0.1"], "Did you mean 'training.learning_rate'"),
    "setting without its section": (["compare", "--set", "lr=0.1"], "Did you mean 'training.learning_rate'"),
    "assignment with a blank": (["compare", "--set", "rounds", "3"], "without blanks"),
    "list without brackets": (["compare", "--set", "seeds=3"], "seeds = [3]"),
    "table as a value": (["compare", "--set", "training=fast"], "training.NAME"),
    "alpha of equal parts": (["compare", "--partition", "iid", "--alpha", "0.1"], "means nothing"),
    "alpha is zero": (["compare", "--alpha", "0"], "above 0"),
    "no clients": (["compare", "--clients", "0"], "clients=0"),
    "no such GPU": (["compare", "--device", "cuda:99"], "cuda:99"),
    "user's model with a dot": (["compare", "--model", "its_models.two_classes"], "'its_models:two_classes'"),
    "user's model as a file": (["compare", "--model", "./its_models.py:two_classes"], "'its_models:two_classes'"),
    "user's model with parentheses": (["compare", "--model", "its_models:two_classes()"], "'its_models:two_classes'"),
    "user's model misspelt": (["compare", "--model", "its_models:two_clases"], "Did you mean 'two_classes'"),
    "user's model is lazy": (["compare", "--model", "its_models:lazy"], "belongs to a lazy layer"),
    "user's model returns a tuple": (["compare", "--model", "its_models:pair"], "returns a tuple"),
    "user's factory raises": (["compare", "--model", "its_models:raises"], "OSError: no weights here"),
    "user's factory wants an argument": (["compare", "--model", "its_models:sized"], "requires the option 'width'"),
    "user's module raises": (["compare", "--model", "broken:net"], "Mend the module"),
    "folders to merge": (["merge", ".", ".", "--model", "mlp", "--out", "m.safetensors"], "is a folder"),
    "pickles to merge": (["merge", "m.pt", "m.pt", "--model", "mlp", "--out", "m.safetensors"], "no safetensors file"),
    "all clients diverge": (
        ["compare", *SMALL, "--set", "training.learning_rate=1e38", "--set", "training.momentum=0.9"],
        "NaN or infinite",
    ),
    "all clients fail": (["compare", *SMALL, "--set", "faults.crash=1"], "client 0: it crashed in round 1"),
    "all clients fail in every round": (
        ["compare", *SMALL, "--set", "faults.crash=1", "--set", "on_too_few=skip"],
        "no round merged anything",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_one_clear_line_and_no_record(mistake, monkeypatch, capsys, tmp_path):
    (tmp_path / "corrupt.toml").write_text("rounds = = 3\n")
    (tmp_path / "key.toml").write_text("round = 3\n")
    (tmp_path / "its_models.py").write_text(
        "from torch import nn\n"
        "def wants_three(): return nn.Conv2d(3, 8, 3)\n"
        "def two_classes(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))\n"
        "def lazy(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))\n"
        "def raises(): raise OSError('no weights here')\n"
        "def sized(width): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "class pair(nn.Flatten):\n"
        "    def forward(self, x): return super().forward(x), x\n"
    )
    (tmp_path / "broken.py").write_text("import its_models_of_yesterday\n")
    (tmp_path / "m.pt").write_bytes(b"a pickle")
    monkeypatch.syspath_prepend(tmp_path)
    arguments, words = MISTAKES[mistake]
    code, _, err = fedmerge(monkeypatch, capsys, *arguments)
    line = err.strip().splitlines()[-1]
    assert code == 2
    assert line.startswith("error: ")
    assert words in line
    assert "Traceback" not in err
    finished = [path for path in tmp_path.rglob("*") if path.is_dir() and path.name.endswith("-seed0")]
    assert not finished


FLAGS = {
    "misspelt flag": (["compare", "--method", "fedavg"], "Did you mean --methods?"),
    "misspelt command": (["compar"], "No such command 'compar'. Did you mean 'compare'?"),
    "no such command": (["frobnicate"], "There are compare, run, resume"),
    "flag of another program": (["compare", "--num-clients", "3"], "Did you mean --clients?"),
    "setting as a flag": (["compare", "--lr", "0.1"], "Write --set training.learning_rate=VALUE"),
    "long setting as a flag": (["partition", "--batch-size", "8"], "Write --set training.batch_size=VALUE"),
    "many methods with blanks": (["compare", "--methods", "fedavg", "krum", "median"], "commas, no blanks"),
    "seeds": (["compare", "--seeds", "0"], "x>=1"),
}


@pytest.mark.parametrize("mistake", FLAGS)
def test_mistakes_in_flags_are_told_once_with_what_was_meant(mistake, monkeypatch, capsys):
    arguments, words = FLAGS[mistake]
    code, _, err = fedmerge(monkeypatch, capsys, *arguments)
    said = " ".join(err.replace("│", " ").split())
    assert code == 2
    assert words in said
    assert said.count("Did you mean") <= 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "words"),
    [("fedfisher", "damping"), ("fedadam", "server_adam (server step)"), ("+ridge_head", "ridge_head (refinement)")],
)
def test_methods_tells_all_about_one(name, words, monkeypatch, capsys):
    code, out, _ = fedmerge(monkeypatch, capsys, "methods", name)
    assert code == 0
    assert words in out
    assert "defaults: " in out
    assert ">>>" not in out


def test_methods_names_the_nearest_for_a_misspelt_one(monkeypatch, capsys):
    code, _, err = fedmerge(monkeypatch, capsys, "methods", "fedvag")
    assert code == 2
    assert "Did you mean 'fedavg'" in err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["compare", "--help"], ["merge", "-h"]])
def test_help_and_version_import_nothing_heavy(arguments):
    code = (
        f"import sys; sys.argv=['fedmerge', *{arguments}];from fedmerge.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch','numpy','scipy','pydantic','flwr','ray','matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "fedmerge", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"fedmerge {__version__}"


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
@pytest.mark.parametrize("behind", [False, True])
def test_quiet_shows_results_only(flag, behind, monkeypatch, capsys):
    command = ["compare", *SMALL, "--out", "o"]
    code, out, err = fedmerge(monkeypatch, capsys, *([*command, flag] if behind else [flag, *command]))
    assert code == 0
    assert "round 1/1" not in out
    assert "fedavg" in out
    assert err == ""


def test_verbose_tells_flowers_log_too(monkeypatch, capsys):
    def told(*flags):
        return fedmerge(monkeypatch, capsys, "compare", *SMALL, "--out", f"o{len(flags)}", *flags)[2]

    assert "INFO: merge:" in told("-v")
    assert "INFO" not in told()


def test_shell_completion_is_offered(monkeypatch, capsys):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, out, _ = fedmerge(monkeypatch, capsys, "--show-completion", "bash")
    assert code == 0
    assert "_FEDMERGE_COMPLETE" in out


def test_a_comparison_grows_by_methods_seeds_and_rounds(monkeypatch, capsys, tmp_path):
    def grown(*arguments):
        code, out, _ = fedmerge(monkeypatch, capsys, "compare", *SMALL, "--out", "g", *arguments)
        assert code == 0
        rows = list(csv.DictReader((tmp_path / "g" / "summary.csv").open()))
        return out, {row["method"]: (row["seeds"], row["rounds"]) for row in rows}

    def losses(name):
        lines = (tmp_path / "g" / name / "rounds.jsonl").read_text().splitlines()
        return [json.loads(line)["test_loss"] for line in lines]

    grown("--rounds", 2)
    first = (tmp_path / "g" / "fedavg-seed0" / "rounds.jsonl").read_bytes()
    out, rows = grown("--rounds", 2, "--methods", "krum(attackers=0)")
    assert rows == {"fedavg": ("1", "2"), "krum(attackers=0)": ("1", "2")}
    assert "krum(attackers=0)" in out
    _, rows = grown("--rounds", 2, "--seeds", 2)
    assert rows["fedavg"] == ("2", "2")
    assert (tmp_path / "g" / "fedavg-seed0" / "rounds.jsonl").read_bytes() == first
    _, rows = grown("--rounds", 4)
    assert rows["fedavg"] == ("2", "3")  # seed 1 was not asked for again
    assert (tmp_path / "g" / "fedavg-seed0" / "rounds.jsonl").read_bytes().startswith(first)
    four = losses("fedavg-seed0")
    fedmerge(monkeypatch, capsys, "compare", *SMALL, "--out", "whole", "--rounds", 4)
    lines = (tmp_path / "whole" / "fedavg-seed0" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["test_loss"] for line in lines] == four
    assert tomllib.loads((tmp_path / "g" / "fedavg-seed0" / "config.toml").read_text())["rounds"] == 4


def test_a_comparison_does_not_shrink(monkeypatch, capsys):
    fedmerge(monkeypatch, capsys, "compare", *SMALL, "--out", "g", "--rounds", 2)
    code, _, err = fedmerge(monkeypatch, capsys, "compare", *SMALL, "--out", "g", "--rounds", 1)
    assert code == 2
    assert "has 2 rounds already" in err


def test_a_growing_comparison_that_was_killed_keeps_what_it_had(monkeypatch, capsys, tmp_path):
    from fedmerge.simulation.runs.config import load_config, make_config
    from fedmerge.simulation.runs.unfinished import begin

    command = ["compare", *SMALL, "--out", "g"]
    fedmerge(monkeypatch, capsys, *command, "--rounds", 2)
    first = (tmp_path / "g" / "fedavg-seed0" / "rounds.jsonl").read_bytes()
    config = load_config(tmp_path / "g" / "fedavg-seed0" / "config.toml")
    begin(make_config(config, {"rounds": 3}), tmp_path / "g", grow=True)  # and killed right here
    assert not (tmp_path / "g" / "fedavg-seed0").exists()
    code, _, err = fedmerge(monkeypatch, capsys, *command, "--rounds", 3)
    assert code == 2
    assert "`fedmerge resume g` goes on with it" in err
    assert fedmerge(monkeypatch, capsys, "resume", "g")[0] == 0
    assert (tmp_path / "g" / "fedavg-seed0" / "rounds.jsonl").read_bytes().startswith(first)


@pytest.mark.parametrize("command", ["compare", "run"])
@pytest.mark.parametrize("left", ["plan and run", "plan", "run"])
def test_what_was_interrupted_is_neither_begun_anew_nor_added_to_in_silence(
    left, command, monkeypatch, capsys, tmp_path
):
    from fedmerge.simulation.runs.unfinished import PLAN

    given = ["compare", *SMALL, "--out", "g"]
    fedmerge(monkeypatch, capsys, *given)
    (tmp_path / "again.toml").write_bytes((tmp_path / "g" / "fedavg-seed0" / "config.toml").read_bytes())
    if "plan" in left:
        (tmp_path / "g" / PLAN).write_bytes((tmp_path / "again.toml").read_bytes())
    if "run" in left:
        (tmp_path / "g" / "fedavg-seed0").rename(tmp_path / "g" / "fedavg-seed0.partial")
    given = given if command == "compare" else ["run", "again.toml", "--out", "g"]
    before = {path: path.read_bytes() for path in (tmp_path / "g").rglob("*") if path.is_file()}
    code, _, err = fedmerge(monkeypatch, capsys, *given)
    assert code == 2
    assert err.count("\n") == 1
    assert "`fedmerge resume g` goes on with it; or pass --overwrite" in err
    assert {path: path.read_bytes() for path in (tmp_path / "g").rglob("*") if path.is_file()} == before
    given = [*given, "--overwrite"] if left == "plan" else ["resume", "g"]
    assert fedmerge(monkeypatch, capsys, *given)[0] == 0
    assert {path.name for path in (tmp_path / "g").iterdir() if path.is_dir()} == {"fedavg-seed0"}
    assert not (tmp_path / "g" / PLAN).exists()


def test_a_folder_in_use_is_refused_by_every_command_that_writes_to_it(monkeypatch, capsys, tmp_path):
    from fedmerge.records.locks import LOCK, held

    given = ["compare", *SMALL, "--out", "g"]
    with held(tmp_path / "g" / LOCK, "g"):  # one that has just begun
        assert "g is in use by process" in fedmerge(monkeypatch, capsys, "resume", "g")[2]
    assert fedmerge(monkeypatch, capsys, *given)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "g").rglob("*") if path.is_file()}
    with held(tmp_path / "g" / LOCK, "g"):
        for command in (
            [*given, "--rounds", 2],
            [*given, "--overwrite"],
            ["run", "g/fedavg-seed0/config.toml", "--out", "g"],
            ["resume", "g"],
            ["resume", "g/fedavg-seed0"],
        ):
            code, out, err = fedmerge(monkeypatch, capsys, *command)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert "g is in use by process" in err
            assert "wait until it has ended, or end it first" in err
        assert fedmerge(monkeypatch, capsys, "plot", "g", "--out", "p.png")[0] == 0  # it only reads
    assert {path: path.read_bytes() for path in (tmp_path / "g").rglob("*") if path.is_file()} == before


def test_records_tell_what_they_ran_on(monkeypatch, capsys, tmp_path):
    fedmerge(monkeypatch, capsys, "compare", *SMALL, "--out", "o")
    fedmerge(monkeypatch, capsys, "compare", *SMALL, "--out", "o", "--rounds", 2)
    first, second = tomllib.loads((tmp_path / "o" / "fedavg-seed0" / "environment.toml").read_text())["sessions"]
    assert first["torch"] == torch.__version__
    assert first["fedmerge"] == __version__
    assert first["flwr"] == version("flwr")
    assert first["processor"]
    assert first["date"] <= second["date"]
    assert (first.get("after_round"), second["after_round"]) == (None, 1)


def test_two_comparisons_of_one_method_are_drawn_under_labels(monkeypatch, capsys, tmp_path):
    for folder in ("a", "b"):
        fedmerge(monkeypatch, capsys, "compare", *SMALL, "--out", folder)
    code, _, err = fedmerge(monkeypatch, capsys, "plot", "a", "b")
    assert code == 2
    assert "--labels" in err
    for kind in ("convergence", "traffic"):
        command = ["plot", "a", "b", "--labels", "before,after", "--out", f"{kind}.svg", "--kind", kind]
        assert fedmerge(monkeypatch, capsys, *command)[0] == 0
        assert (tmp_path / f"{kind}.svg").stat().st_size > 5_000
    assert {run.method for run in read_runs([tmp_path / "a", tmp_path / "b"], ["x", "y"])} == {
        "fedavg (x)",
        "fedavg (y)",
    }
    code, _, err = fedmerge(monkeypatch, capsys, "plot", "a", "b", "--labels", "one")
    assert code == 2
    assert "1 labels for 2 folders" in err


LONG = "krum(attackers=0,selected=2)+server_momentum(momentum=0.5)"


def test_tables_can_be_read_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    methods = f"fedavg,{LONG}"
    code, out, _ = fedmerge(
        monkeypatch, capsys, "compare", *SMALL[:-2], "--methods", methods, "--seeds", 2, "--out", "o"
    )
    assert code == 0
    table = out[out.index("Test accuracy") :].splitlines()
    table = table[: next(i for i, line in enumerate(table) if line.startswith("└")) + 1]
    assert max(map(len, table)) <= 80
    assert "…" not in "".join(table)
    assert LONG in "".join(line.split("│")[1].strip() for line in table if line.count("│") > 2)
    out = fedmerge(monkeypatch, capsys, "methods")[1]
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert "median_norm_clipping" in out


def test_runs_that_learn_nothing_have_no_target(monkeypatch, capsys):
    still = ["--set", "training.learning_rate=1e-9", "--rounds", "2"]
    out = fedmerge(monkeypatch, capsys, "compare", *SMALL, *still, "--out", "o")[1]
    assert "to target" in out
    assert "rounds until" not in out
