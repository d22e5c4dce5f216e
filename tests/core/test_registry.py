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
from fedmerge.errors import FedMergeError, InvalidOption, UnknownName
from fedmerge.registry import build, entry, register

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
    fedmerge.methods()
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    registry._discover.cache_clear()
    yield
    registry._discover.cache_clear()


def announce(monkeypatch, value):
    point = importlib.metadata.EntryPoint("plugin", value, registry.ENTRY_POINTS)
    real = importlib.metadata.entry_points

    def entry_points(**selection):
        return [point] if selection == {"group": registry.ENTRY_POINTS} else real(**selection)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_another_packages_method_is_found_and_works(open_registry, monkeypatch, tmp_path):
    (tmp_path / "its_package.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    announce(monkeypatch, "its_package")
    assert fedmerge.methods()["first"].summary == "The first client's model."
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    assert torch.equal(fedmerge.merge([a, b], "first").weight, a.weight)
    sys.modules.pop("its_package")


def test_another_package_that_fails_is_named(open_registry, monkeypatch):
    announce(monkeypatch, "no_such_package")
    with pytest.raises(FedMergeError, match=r"plugin.*no_such_package.*uninstall"):
        fedmerge.methods()


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
    assert asked == [{"group": "fedmerge.aggregators"}]


@pytest.mark.parametrize("decorate", [lambda cls: cls, dataclass])
def test_only_frozen_dataclasses_register(open_registry, decorate):
    class Loose:
        kind = "aggregator"

    with pytest.raises(FedMergeError, match="frozen=True"):
        register("loose")(decorate(Loose))


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
