"""``module:factory``: the user's own model."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch

from fedmerge.errors import ModelError, UnknownName
from fedmerge.models import build_model, model_options

SOURCE = """
from math import prod
from torch import nn

def both(input_shape, num_classes, *, width=4):
    model = nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), width), nn.Linear(width, num_classes))
    model.seen = input_shape, num_classes
    return model

def classes_only(num_classes):
    return nn.Linear(2, num_classes)

def neither():
    return nn.Linear(2, 3)

def anything(**options):
    model = nn.Linear(2, 3)
    model.seen = options
    return model

def demanding(num_classes, depth):
    return nn.Linear(depth, num_classes)

def broken(num_classes):
    raise ZeroDivisionError("mine")

def no_model(num_classes):
    return "linear"

class Own(nn.Module):
    def __init__(self, num_classes, scale=2):
        super().__init__()
        self.output = nn.Linear(scale, num_classes)

    def forward(self, x):
        return self.output(x)

ready = nn.Linear(2, 3)
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_models_for_test.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models_for_test", raising=False)
    return "own_models_for_test"


def test_factory_gets_what_it_names_and_the_options(module: str) -> None:
    model = build_model(f"{module}:both", [1, 2, 3], 5, seed=0, width=7)  # type: ignore[arg-type]
    assert model.seen == ((1, 2, 3), 5)
    assert model(torch.zeros(2, 1, 2, 3)).shape == (2, 5)
    assert model.get_parameter("1.weight").shape == (7, 6)


def test_factory_gets_nothing_that_it_does_not_name(module: str) -> None:
    assert build_model(f"{module}:classes_only", (2,), 5, seed=0).get_parameter("weight").shape == (5, 2)
    assert build_model(f"{module}:neither", (2,), 5, seed=0).get_parameter("weight").shape == (3, 2)
    assert build_model(f"{module}:anything", (2,), 5, seed=0, free=1).seen == {"free": 1}


def test_a_module_class_is_a_factory(module: str) -> None:
    model = build_model(f"{module}:Own", (2,), 5, seed=0, scale=3)
    assert type(model).__name__ == "Own"
    assert model.get_parameter("output.weight").shape == (5, 3)


def test_it_is_seeded_like_the_rest(module: str) -> None:
    torch.manual_seed(8)
    state = torch.get_rng_state()
    one, same, other = (
        build_model(f"{module}:both", (4,), 5, seed=seed).get_parameter("1.weight") for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_a_failing_factory_leaves_the_global_random_state_and_its_own_error(module: str) -> None:
    torch.manual_seed(8)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError, match="mine"):
        build_model(f"{module}:broken", (4,), 5, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_options_of_a_factory(module: str) -> None:
    assert model_options(f"{module}:both") == {"width": 4}
    assert model_options(f"{module}:demanding") == {"depth": inspect.Parameter.empty}
    assert model_options(f"{module}:anything") == {}


def test_current_directory_is_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models_here_for_test.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    assert build_model("models_here_for_test:Own", (2,), 5, seed=0).get_parameter("output.bias").shape == (5,)
    assert sys.path[0] == str(tmp_path)
    build_model("models_here_for_test:Own", (2,), 5, seed=0)
    assert sys.path.count(str(tmp_path)) == 1
    del sys.modules["models_here_for_test"]


def test_unknown_option(module: str) -> None:
    with pytest.raises(UnknownName, match=r"both option 'widht'\. Did you mean 'width'\?"):
        build_model(f"{module}:both", (2,), 5, seed=0, widht=3)
    with pytest.raises(UnknownName, match="It takes none"):
        build_model(f"{module}:neither", (2,), 5, seed=0, depth=3)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "missing",
            r"module 'own_models_for_test' \(.*own_models_for_test\.py\) has no factory 'missing'.*Define",
        ),
        ("no_model", r"own_models_for_test:no_model'.*returned a str, not a torch\.nn\.Module.*Return"),
        ("ready", "'ready' .*is a Linear, not a factory.*function or a module class"),
        ("number", "'number' .*is a int, not a factory"),
        ("demanding", "demanding' requires the option 'depth'.*Set it"),
        ("", "lacks a part.*module:factory"),
    ],
)
def test_factory_errors(module: str, factory: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(f"{module}:{factory}", (2,), 5, seed=0)


def test_module_that_does_not_exist() -> None:
    with pytest.raises(ModelError, match=r"cannot import module 'no_such_module_here'.*'make'.*directory") as raised:
        build_model("no_such_module_here:make", (2,), 5, seed=0)
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_package_here", "ModuleNotFoundError: No module named 'no_such_package_here'"),
        ("raise RuntimeError('half way')", "RuntimeError: half way"),
        ("def make(:", "SyntaxError"),
    ],
)
def test_module_that_breaks_on_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "broken_models_for_test.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=rf"cannot import module 'broken_models_for_test'.*{message}"):
        build_model("broken_models_for_test:make", (2,), 5, seed=0)


@pytest.mark.parametrize("name", [":", ":make", "module:", "builtins:dict"])
def test_names_that_lead_nowhere(name: str) -> None:
    with pytest.raises(ModelError, match=r"lacks a part|does not tell its parameters"):
        build_model(name, (2,), 5, seed=0)
