"""Federations that start from a pretrained base."""

from __future__ import annotations

import sys

import pytest
import torch

from fedmerge import cli
from fedmerge.commands.options import read_config
from fedmerge.errors import ConfigError
from fedmerge.models import build_model
from fedmerge.records.atomic_files import read_toml, write_tensors
from fedmerge.records.model_tensors import digest
from fedmerge.records.run_records import read_checkpoint
from fedmerge.simulation.runs.compare import compare
from fedmerge.simulation.runs.config import make_config
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.simulation.runs.unfinished import find_unfinished
from fedmerge.wire.record_values import from_arrays

QUICK = {
    "methods": ["fedavg"],
    "rounds": 1,
    "workers": 1,
    "partition": {"scheme": "iid", "clients": 2, "max_examples": 40},
    "training": {"steps": 2, "epochs": None},
}


def base_model(seed=5, classes=10):
    return build_model("mlp", (1, 8, 8), classes, seed=seed, hidden=[8])


@pytest.fixture
def base(tmp_path):
    file = tmp_path / "base.safetensors"
    write_tensors(file, base_model().state_dict())
    return file


def experiment(base, **model):
    settings = {"name": "mlp", "options": {"hidden": [8]}, "pretrained": str(base), **model}
    return Experiment(make_config(QUICK, {"model": settings}), 0)


def last():
    return list(base_model().state_dict())[-1].rpartition(".")[0]


def test_server_and_clients_start_from_the_base(base):
    found = from_arrays(experiment(base).initial_arrays())
    assert all(torch.equal(found[name], tensor) for name, tensor in base_model().state_dict().items())


def test_frozen_parts_are_those_of_the_base(base):
    first = next(iter(base_model().state_dict())).rpartition(".")[0]
    model = experiment(base, frozen=[f"{first}.*"]).model_fn()
    weight = dict(model.named_parameters())[f"{first}.weight"]
    assert not weight.requires_grad
    assert torch.equal(weight, base_model().state_dict()[f"{first}.weight"])


def test_clients_that_start_apart_differ_in_the_new_head_alone(base):
    from fedmerge.simulation.runs.model_fns import OwnModelFn

    made = experiment(base, pretrained_except=[f"{last()}.*"], apart=True)
    own = OwnModelFn(made.model_fn, (), 0)
    a, b = own(0).state_dict(), own(1).state_dict()
    differing = {name for name in a if not torch.equal(a[name], b[name])}
    assert f"{last()}.weight" in differing
    assert all(name.startswith(last()) for name in differing)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"apart": True}, "model.apart"),
        ({"variants": [{"hidden": [4]}]}, "model.variants"),
        ({"pretrained": None, "prefix": {"a": "b"}}, "model.prefix is for"),
        ({"pretrained": "base.pt"}, "ends in .safetensors"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(base, model, words):
    with pytest.raises(ConfigError, match=words):
        experiment(base, **model)


CONFIG = """
methods = ["fedavg"]
rounds = 1
workers = 1
personal = ["{last}.*"]
partition = {{scheme = "iid", clients = 2, max_examples = 40}}
training = {{steps = 2}}
model = {{name = "mlp", options = {{hidden = [8]}}, pretrained = "{base}"}}
"""


def test_a_record_holds_the_digest_and_is_not_taken_up_with_another_file(base, tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (base.parent / "run.toml").write_text(CONFIG.format(base=base.name, last=last()))
    config = read_config(base.parent / "run.toml", {}, [])
    (run,), failed = compare(config, folder / "out")
    assert not failed
    recorded = read_toml(run / "config.toml")["model"]
    assert recorded["pretrained"] == str(base)  # beside the configuration, not in the current folder
    assert recorded["pretrained_digest"] == digest(base)
    _, state, _ = read_checkpoint(run)
    first = next(iter(base_model().state_dict()))
    moved = (state[first] - base_model().state_dict()[first]).abs().max()
    assert 0 < moved < 0.1 * base_model().state_dict()[first].abs().max() + 0.1
    (resumed,) = find_unfinished(folder / "out").configs
    assert resumed.model.base == config.model.base
    write_tensors(base, base_model(seed=6).state_dict())
    with pytest.raises(ConfigError, match="is not the file that this was run with"):
        find_unfinished(folder / "out")


def test_code_that_makes_a_base_is_told_or_refused_before_it_is_imported(tmp_path, monkeypatch, capsys):
    (tmp_path / "maker_of_base.py").write_text(
        "from pathlib import Path\nPath('imported').touch()\n"
        "from fedmerge.models import build_model\n"
        "def base(input_shape, num_classes):\n"
        "    return build_model('mlp', input_shape, num_classes, seed=9, hidden=[8])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    asked = ["fedmerge", "compare", "--pretrained", "maker_of_base:base", "--no-code", "--out", "out"]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    assert "runs code: pretrained base maker_of_base:base" in capsys.readouterr().err
    assert not (tmp_path / "imported").exists()
    found = from_arrays(experiment("maker_of_base:base").initial_arrays())
    assert all(torch.equal(found[name], tensor) for name, tensor in base_model(seed=9).state_dict().items())
