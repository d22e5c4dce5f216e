"""A spec that was found before serves models that do the same, and no others."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedmerge.permutations import trace
from fedmerge.permutations import trace as tracing


@dataclass
class Settings:
    ordered: bool
    more: dict = field(default_factory=dict)


class Switched(nn.Module):
    """Ordered or not, as something says that is neither a number nor a name of the module's own."""

    def __init__(self, settings, read):
        super().__init__()
        self.settings, self.read = settings, read
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x):
        hidden = torch.relu(self.a(x))
        return self.b(hidden.cumsum(1) if self.read(self.settings) else hidden)


def _attribute(settings):
    return settings.ordered


SETTINGS = {
    "namespace": lambda ordered: Switched(SimpleNamespace(ordered=ordered), _attribute),
    "dataclass": lambda ordered: Switched(Settings(ordered), _attribute),
    "dict": lambda ordered: Switched({"ordered": ordered}, lambda s: s["ordered"]),
    "list": lambda ordered: Switched([ordered], lambda s: s[0]),
    "nest": lambda ordered: Switched(Settings(False, {"how": [ordered]}), lambda s: s.more["how"][0]),
    "closure": lambda ordered: Switched(None, lambda _: ordered),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("first", [True, False])
def test_settings_of_any_form_tell_models_apart(name, first):
    torch.manual_seed(0)
    x, found = torch.randn(4, 8), {}
    for ordered in (first, not first):
        found[ordered] = [group.size for group in trace(SETTINGS[name](ordered), x).groups]
    assert found == {True: [], False: [32]}


FLAG = True


class Global(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x):
        hidden = torch.relu(self.a(x))
        return self.b(hidden.cumsum(1) if FLAG else hidden)


def test_a_global_tells_models_apart(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    assert trace(Global(), x).groups == ()
    monkeypatch.setattr(__import__(__name__, fromlist=["FLAG"]), "FLAG", False)
    assert [group.size for group in trace(Global(), x).groups] == [32]


def test_a_hook_tells_models_apart():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    plain, hooked = (nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3)) for _ in range(2))
    hooked[0].register_forward_hook(lambda module, args, output: output.cumsum(1))
    assert trace(hooked, x).groups == ()
    assert [group.size for group in trace(plain, x).groups] == [16]


def test_outputs_tell_models_apart():
    class Model(nn.Module):
        def __init__(self, told):
            super().__init__()
            self.told, self.a, self.b = told, nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            hidden = self.a(x)
            return {"out": self.b(hidden), **({"hidden": hidden} if self.told["hidden"] else {})}

    torch.manual_seed(0)
    x = torch.randn(4, 8)
    assert trace(Model({"hidden": True}), x).groups == ()
    assert [group.size for group in trace(Model({"hidden": False}), x).groups] == [16]


def test_models_that_do_the_same_share_a_spec(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    one, other = (SETTINGS["namespace"](False) for _ in range(2))
    first = trace(one, x)

    def never(*_):
        raise AssertionError("it was exported again")

    monkeypatch.setattr(tracing_module(), "exported", never)
    assert trace(other, x) is first


def tracing_module():
    import sys

    return sys.modules[tracing.__module__]
