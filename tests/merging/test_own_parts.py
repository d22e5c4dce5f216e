"""Parts of a method of one's own in one file, by ``module:name``: edits, server steps, refinements, trajectories."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fedmerge
from fedmerge.aggregators import Aggregator
from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.cli import app
from fedmerge.edits import Edit
from fedmerge.errors import ConfigError, InvalidOption, UnknownName
from fedmerge.lookup.own_code import named_code
from fedmerge.merging import build_pipeline
from fedmerge.refine import Recalibrate
from fedmerge.registry import find, register
from fedmerge.server_steps import ServerStep
from fedmerge.simulation import Experiment, compare, make_config
from fedmerge.statistics import Statistic
from fedmerge.strategies import MergeStrategy
from fedmerge.training.correction import Correction
from fedmerge.training.rules import LocalRule
from fedmerge.trajectories import Trajectory
from tests.outcomes import outcome

HERE = __name__


@dataclass(frozen=True)
class Shrink(Edit):
    """Every update, times a factor."""

    factor: float = 0.5

    def edit(self, delta, context):
        return {name: self.factor * tensor for name, tensor in delta.items()}


@dataclass(frozen=True)
class Half(ServerStep):
    """Part of the way."""

    rate: float = 0.5

    def step(self, base, merged, memory):
        return {name: base[name] + self.rate * (merged[name] - base[name]) for name in merged}, {}


@dataclass(frozen=True)
class Again(Recalibrate):
    """A refinement of one's own."""


@dataclass(frozen=True)
class Last(Trajectory):
    """The model as it is, times a factor."""

    factor: float = 1.0

    def average(self, state, context, memory):
        return {name: self.factor * tensor for name, tensor in state.items()}, {}


@dataclass(frozen=True)
class Mean(FedAvg):
    """An aggregator of one's own."""


@dataclass(frozen=True)
class Alien:
    """Frozen, and no part of a method."""


def _two() -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)


def test_models_at_hand_go_through_edits_and_steps_of_ones_own():
    a, b, base = _two()
    moved = (a.weight + b.weight) / 2 - base.weight
    for method, factor in [
        (f"{HERE}:Shrink+fedavg", 0.5),
        (f"{HERE}:Shrink(factor=0.25)+fedavg", 0.25),
        (f"fedavg+{HERE}:Half(rate=0.1)", 0.1),
        (f"{HERE}:Shrink(factor=0.5)+{HERE}:Mean+{HERE}:Half(rate=0.5)", 0.25),
        (f"{HERE}:Shrink+trim(density=1.0)+{HERE}:Mean", 0.5),
    ]:
        merged = fedmerge.merge([a, b], method, base=base).weight
        assert torch.allclose(merged, base.weight + factor * moved, atol=1e-6), method


def test_each_kind_is_found_by_what_its_class_is():
    pipeline = build_pipeline(f"{HERE}:Shrink+{HERE}:Mean+{HERE}:Half+{HERE}:Again+{HERE}:Last(factor=2)")
    assert (pipeline.edits, pipeline.aggregator, pipeline.server_steps) == ((Shrink(),), Mean(), (Half(),))
    assert (pipeline.refinements, pipeline.trajectories) == ((Again(),), (Last(2.0),))
    assert find(f"{HERE}:Half").kind == "server step"
    assert MergeStrategy(f"{HERE}:Shrink+fedavg").pipeline.edits == (Shrink(),)


def test_a_comparison_runs_them_and_a_record_gives_them_again(tmp_path):
    base = {"rounds": 2, "partition": {"clients": 2, "scheme": "iid"}, "model": {"name": "logistic"}}
    edited, stepped = f"{HERE}:Shrink+fedavg", f"fedavg+{HERE}:Half"
    options = {f"{HERE}:Shrink": {"factor": 0.5}}
    config = make_config(base, {"methods": ["fedavg", edited, stepped], "options": options})
    (plain, *others), failed = compare(config, tmp_path / "one")
    assert not failed
    states = [outcome(run)[1]["state"] for run in (plain, *others)]
    assert states[0] != states[1]
    assert Experiment(config, 0).strategy(edited).pipeline.edits == (Shrink(0.5),)
    again = make_config(config.resolved(edited, 0))
    (run,), failed = compare(again, tmp_path / "two")
    assert not failed
    assert outcome(run) == outcome(others[0])


def test_the_command_line_takes_them_from_a_file_beside_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "beside_toml.py").write_text(
        "from dataclasses import dataclass\nfrom fedmerge.edits import Edit\n\n@dataclass(frozen=True)\n"
        "class Shrink(Edit):\n    factor: float = 0.5\n\n    def edit(self, delta, context):\n"
        "        return {n: self.factor * t for n, t in delta.items()}\n"
    )
    config = tmp_path / "run.toml"
    config.write_text(
        'methods = ["beside_toml:Shrink(factor=0.25)+fedavg"]\nrounds = 1\n[model]\nname = "logistic"\n'
        '[partition]\nclients = 2\nscheme = "iid"\n'
    )
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["compare", str(config), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    refused = CliRunner().invoke(app, ["compare", str(config), "--no-code", "--out", str(tmp_path / "other")])
    assert refused.exit_code != 0
    assert "beside_toml:Shrink" in refused.output + str(refused.exception)


def test_all_that_would_be_imported_is_told():
    code = named_code([], ["mine:Shrink+dare+mine:Mean(x=1)+mine:Step"])
    assert code == ["method mine:Shrink", "method mine:Mean", "method mine:Step"]


def test_a_configuration_is_read_without_importing_them():
    config = make_config({"methods": ["nowhere:Shrink+fedavg", "fedavg+nowhere:Step", "nowhere:A+nowhere:B"]})
    for method in config.methods:
        assert make_config(config.resolved(method, 0)).methods == (method,)


@pytest.mark.parametrize(
    ("method", "kind", "words"),
    [
        ("{0}:Shrink(facter=2)+fedavg", UnknownName, "Did you mean 'factor'"),
        ("{0}:Shrink(factor=much)+fedavg", InvalidOption, "factor"),
        ("{0}:Shrink", ConfigError, "Shrink\\+fedavg"),
        ("{0}:Half+fedavg", ConfigError, "is a server step, which stands behind an aggregator: write fedavg\\+"),
        ("fedavg+{0}:Shrink", UnknownName, "so it stands in front"),
        ("{0}:Mean+fedavg", UnknownName, "has an aggregator already"),
        ("fedavg+{0}:Last+{0}:Half", ConfigError, "is a server step and happens before"),
        ("fedavg+{0}:Alien", ConfigError, "is no edit, server step, refinement or trajectory"),
        ("fedavg+{0}:Hlaf", ConfigError, "Did you mean 'Half'"),
        ("nowhere:Shrink+fedavg", ConfigError, "cannot import module 'nowhere'"),
    ],
)
def test_what_is_wrong_with_one_is_told(method, kind, words):
    a, b, base = _two()
    with pytest.raises(kind, match=words):
        fedmerge.merge([a, b], method.format(HERE), base=base)


@pytest.mark.parametrize("make", [lambda m, **k: fedmerge.merge(list(_two()[:2]), m, **k), MergeStrategy])
def test_an_option_given_by_keyword_that_is_its_own_is_told_where_to_write(make):
    with pytest.raises(UnknownName, match=r"Options of .*:Shrink stand behind it: .*:Shrink\(factor=\.\.\.\)"):
        make(f"{HERE}:Shrink+fedavg", factor=0.5)


@register("row_count")
@dataclass(frozen=True)
class RowCount(Statistic):
    """Examples of a client, a statistic of one's own."""

    name = "row_count"
    agreed = False

    def measure(self, model, batches, report):
        return {"rows": torch.tensor(float(sum(len(y) for _, y in batches)), dtype=torch.float64)}

    def parse(self, value):
        return {"rows": value["rows"]}

    def check(self, value, state):
        assert value["rows"].ndim == 0

    def check_shapes(self, shapes, state):
        return

    def voted(self, shapes):
        return {}


@register("tug")
@dataclass(frozen=True)
class Tug(LocalRule):
    """A local rule of one's own."""

    name = "tug"

    def correction(self, sent, kept):
        return Correction(0.5)


@dataclass(frozen=True)
class ByRows(Aggregator):
    """The mean by what clients count, with a rule of one's own."""

    needs = (RowCount(),)

    @property
    def local_rule(self):
        return Tug()

    def merge(self, updates, context, memory):
        updates = list(updates)
        rows = [float(update.statistic("row_count")["rows"]) for update in updates]
        names = updates[0].state
        mean = {n: sum(r * u.state[n] for r, u in zip(rows, updates, strict=True)) / sum(rows) for n in names}
        return mean, {}


def test_statistics_and_rules_of_ones_own_come_with_an_aggregator(tmp_path):
    base = {"rounds": 1, "partition": {"clients": 3, "scheme": "dirichlet"}, "model": {"name": "logistic"}}
    mu = {"training": {"proximal_mu": 0.5}}
    (mine,), failed = compare(make_config(base, {"methods": [f"{HERE}:ByRows"]}), tmp_path / "one")
    assert not failed
    (usual,), failed = compare(make_config(base, mu, {"methods": ["fedavg"]}), tmp_path / "two")
    assert not failed
    own, other = (torch.tensor(outcome(run)[0][-1]["test_loss"]) for run in (mine, usual))
    assert torch.allclose(own, other, rtol=1e-6)
