"""Finding and making methods."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge import registry
from fedmerge.aggregators import Aggregator
from fedmerge.data import PartitionSettings
from fedmerge.errors import ConfigError, FedMergeError, InvalidOption, UnknownName
from fedmerge.lookup.kinds import KINDS, METHOD_KINDS, kind_of
from fedmerge.registry import build, entries, entry, register

PLUGIN = '''
from dataclasses import dataclass
from fedmerge.aggregators import Aggregator
from fedmerge.registry import register

@register("first", paper="none")
@dataclass(frozen=True)
class First(Aggregator):
    """The first client's model."""

    def merge(self, updates, context, memory):
        return next(iter(updates)).state, {}
'''


@pytest.fixture
def open_registry(monkeypatch):
    """A registry that may be changed, and discovery that runs again; both as before afterwards."""
    for kind in KINDS:  # what is imported now registers once
        entries(kind)
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    registry._discover.cache_clear()
    yield
    registry._discover.cache_clear()


def installed(folder, name, points):
    """A distribution in `folder` that announces entry points, as pip leaves it."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[fedmerge.{group}]\n" + "".join(f"{line}\n" for line in lines) for group, lines in points.items())
    )


@pytest.fixture
def packages(open_registry, monkeypatch, tmp_path):
    """An importable folder of other packages, whose modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [file.stem for file in tmp_path.glob("*.py")]:
        sys.modules.pop(name, None)


def test_another_packages_method_is_found_and_works(packages):
    (packages / "its_package.py").write_text(PLUGIN)
    installed(packages, "its-package", {"aggregators": ["plugin = its_package"]})
    assert fedmerge.methods()["first"].summary == "The first client's model."
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    assert torch.equal(fedmerge.merge([a, b], "first").weight, a.weight)


PARTS = """
from dataclasses import dataclass
import torch
from torch import nn
from fedmerge.aggregators import Aggregator
from fedmerge.data import Dataset
from fedmerge.observers import Observer
from fedmerge.refine import Refinement
from fedmerge.simulation.scenarios.attacks import Attack
from fedmerge.statistics import Statistic

def blobs(data_dir, spread: float = 1.0):
    "Two heaps of points."
    x, y = torch.randn(20, 2) * spread, torch.arange(20) % 2
    return Dataset("blobs", x, y, x, y, num_classes=2)

def tiny(input_shape, num_classes, bias: bool = True):
    "One layer."
    return nn.Sequential(nn.Flatten(), nn.Linear(2, num_classes, bias=bias))

@dataclass(frozen=True)
class Zero(Attack):
    "Send zeros."
    def sent(self, state, base, generator):
        return {name: torch.zeros_like(tensor) for name, tensor in state.items()}

@dataclass(frozen=True)
class Last(Aggregator):
    "The last client's model."
    def merge(self, updates, context, memory):
        return list(updates)[-1].state, {}

@dataclass(frozen=True)
class Ones(Statistic):
    "One number."
    name = "ones"
    def measure(self, model, batches, report):
        return {"one": torch.ones(())}

class Watching(Observer):
    "Watches."
    def __init__(self, every: int = 1):
        self.every = every
"""


@pytest.mark.parametrize(
    ("group", "name", "value", "options"),
    [
        ("aggregators", "last", "Last", {}),
        ("statistics", "ones", "Ones", {}),
        ("datasets", "blobs", "blobs", {"spread": 1.0}),
        ("models", "tiny", "tiny", {"bias": True}),
        ("attacks", "zero", "Zero", {}),
        ("observers", "watching", "Watching", {"every": 1}),
    ],
)
def test_parts_of_every_kind_may_come_from_another_package(packages, group, name, value, options):
    (packages / "its_parts.py").write_text(PARTS)
    installed(packages, "its-parts", {group: [f"{name} = its_parts:{value}"]})
    found = entry(kind_of(group).name, name)
    assert found.cls is sys.modules["its_parts"].__dict__[value]
    assert found.options == options
    assert found.summary.endswith(".")


def test_data_and_models_of_another_package_are_used_by_name(packages):
    from fedmerge.data import dataset_names, load_dataset
    from fedmerge.models import build_model, model_names

    (packages / "its_parts.py").write_text(PARTS)
    points = {"datasets": ["blobs = its_parts:blobs"], "models": ["tiny = its_parts:tiny"]}
    installed(packages, "its-parts", points)
    assert dataset_names()[-1] == "blobs"
    assert model_names()[-1] == "tiny"
    assert load_dataset("blobs", spread=0.0).train_x.abs().sum() == 0
    assert build_model("tiny", (2,), 3, seed=0, bias=False)[1].bias is None


def halves(dataset, clients, generator, first: float = 0.5):
    """Two clients, the first with a share of the examples."""
    return (torch.arange(len(dataset.train_y)) >= first * len(dataset.train_y)).long()


def test_a_division_of_another_package_is_used_by_name(packages):
    from fedmerge.data import load_dataset, make_partition

    installed(packages, "its-parts", {"partitions": [f"halves = {__name__}:halves"]})
    dataset = load_dataset("digits")
    settings = PartitionSettings("halves", options={"first": 0.25}, held_out=0.0)
    assert [len(rows) for rows in make_partition(dataset, settings, 0).train] == [360, 1077]
    with pytest.raises(UnknownName, match="halves"):
        PartitionSettings("havles")


def test_our_divisions_name_the_settings_that_they_look_at():
    known = entries("partition")
    assert known["dirichlet"].options == known["quantity"].options == {"alpha": 0.3}
    settings = PartitionSettings()
    for found in known.values():
        for name, default in found.options.items():
            assert getattr(settings, name) == default


BROKEN = {
    "not importable": ("thing = no_such_package", "", "ModuleNotFoundError"),
    "raising": ("thing = broken", "raise RuntimeError('no licence')", "no licence"),
    "exiting": ("thing = broken", "raise SystemExit(3)", "SystemExit"),
    "without the thing": ("thing = broken:thing", "", "AttributeError"),
    "no syntax": ("thing = broken", "def", "SyntaxError"),
    "a taken name": ("fedavg = broken:Mine", "from its_parts import Last as Mine", "'fedavg' is taken"),
    "a name of a server step": ("server_adam = broken:Mine", "from its_parts import Last as Mine", "is taken"),
    "of another kind": ("thing = broken:Mine", "from its_parts import Zero as Mine", "of kind 'aggregator'"),
    "no part at all": ("thing = broken:Mine", "Mine = 3", "of kind 'aggregator'"),
    "half-way": ("thing = broken", PLUGIN + "\nraise RuntimeError('half')", "half"),
}


@pytest.mark.parametrize("way", BROKEN)
def test_a_broken_package_costs_a_warning_that_names_it(packages, caplog, way):
    point, code, words = BROKEN[way]
    (packages / "its_parts.py").write_text(PARTS)
    (packages / "broken.py").write_text(code)
    installed(packages, "half-baked", {"aggregators": [point, "last = its_parts:Last"]})
    known = fedmerge.methods()
    (told,) = caplog.records
    assert "package 'half-baked'" in told.getMessage()
    assert words in told.getMessage()
    assert {"fedavg", "last"} <= set(known)  # its other entry point is whole
    assert not {"thing", "first"} & set(known)
    assert known["fedavg"].paper


IMPORTS_AND_FAILS = """
from fedmerge.registry import register

@register("later", kind="observer")
class Later:
    __module__ = "fedmerge.observers.later"

raise RuntimeError
"""


def test_what_a_broken_package_has_imported_of_fedmerge_stays(packages):
    """Modules of fedmerge that it was the first to import do not register a second time."""
    (packages / "broken.py").write_text(IMPORTS_AND_FAILS)
    installed(packages, "half-baked", {"aggregators": ["thing = broken"]})
    fedmerge.methods()
    assert registry._ENTRIES["observer", "later"].name == "later"


def test_a_statistic_is_never_imported_because_its_name_was_sent(tmp_path, monkeypatch):
    from fedmerge.statistics import statistic

    (tmp_path / "sneaky.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownName):
        statistic("sneaky:Thing")


def test_names_of_different_kinds_may_be_the_same(open_registry):
    @register("fedavg", kind="observer")
    class Watching:
        pass

    assert entry("observer", "fedavg").cls is Watching
    assert entry("aggregator", "fedavg").paper


def test_ones_own_goes_by_module_and_name(tmp_path, monkeypatch):
    (tmp_path / "mine_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = build("attack", "mine_parts:Zero", {})
    assert type(made).__name__ == "Zero"
    with pytest.raises(UnknownName, match="option of mine_parts:Watching"):
        build("observer", "mine_parts:Watching", {"evry": 2})
    assert build("observer", "mine_parts:Watching", {"every": "2"}).every == 2
    with pytest.raises(ConfigError, match="Did you mean 'Zero'"):
        build("attack", "mine_parts:Zro", {})
    sys.modules.pop("mine_parts")


def test_a_name_can_be_taken_once(open_registry):
    with pytest.raises(FedMergeError, match=r"'fedavg' is taken by fedmerge\.aggregators\.fedavg\.FedAvg"):

        @register("fedavg")
        @dataclass(frozen=True)
        class Another(Aggregator):
            def merge(self, updates, context, memory):
                return {}, {}


def test_a_name_is_taken_even_for_a_class_called_the_same(open_registry):
    class FedAvg(Aggregator):
        def merge(self, updates, context, memory):
            return {}, {}

    FedAvg.__qualname__, FedAvg.__module__ = "FedAvg", "its_package"
    with pytest.raises(FedMergeError, match="taken"):
        register("fedavg")(dataclass(frozen=True)(FedAvg))


def test_the_same_class_may_be_registered_again(open_registry):
    found = entry("aggregator", "fedavg")
    assert register("fedavg", paper=found.paper)(found.cls) is found.cls
    assert entry("aggregator", "fedavg") == found


def test_other_packages_methods_are_looked_for_once(open_registry, monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selection: asked.append(selection) or ())
    fedmerge.methods(), fedmerge.methods()
    groups = [selection["group"] for selection in asked]
    assert len(groups) == len(set(groups))
    assert {KINDS[kind].group for kind in METHOD_KINDS} <= set(groups)


@pytest.mark.parametrize("decorate", [lambda cls: cls, dataclass])
def test_only_frozen_dataclasses_register(open_registry, decorate):
    class Loose:
        kind = "aggregator"

    with pytest.raises(FedMergeError, match="frozen=True"):
        register("loose")(decorate(Loose))


def test_a_part_of_no_known_kind_is_refused(open_registry):
    with pytest.raises(FedMergeError, match="a kind of edit, aggregator"):

        @register("lost")
        class Lost:
            pass


@pytest.mark.parametrize(
    ("name", "options", "kind", "words"),
    [
        ("fedavgg", {}, UnknownName, "Did you mean 'fedavg'"),
        ("fedavg", {"weight": 1}, UnknownName, "unknown option of fedavg 'weight'"),
        ("fedatt", {"step": 1}, UnknownName, "Did you mean 'step_size'"),
        ("fedatt", {"step_size": "big"}, InvalidOption, "step_size = 'big'"),
        ("fedatt", {"norm": "l1"}, InvalidOption, "'spectral' or 'frobenius'"),
        ("fednova", {"tau_eff": "sum"}, InvalidOption, "tau_eff"),
    ],
)
def test_mistakes_are_named(name, options, kind, words):
    with pytest.raises(kind) as caught:
        build("aggregator", name, options)
    assert words in str(caught.value)


def test_text_becomes_what_the_field_wants():
    assert build("aggregator", "fednova", {"tau_eff": "12.5"}).tau_eff == 12.5
    assert build("aggregator", "fednova", {"tau_eff": "mean_steps"}).tau_eff == "mean_steps"


def test_what_is_known_of_a_method():
    info = fedmerge.methods()["fednova"]
    assert info.name == "fednova"
    assert info.paper == "arXiv:2007.07481"
    assert info.requires_base
    assert not info.requires_data
    assert not info.may_change_width
    assert info.options == {"tau_eff": "mean_norm", "server_momentum": 0.0}
    assert info.summary == entry("aggregator", "fednova").summary != ""
