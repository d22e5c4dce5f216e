"""A model that starts from a pretrained base: what is taken over, what stays as initialised, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge.errors import ModelError, UnknownName
from fedmerge.models import build_model
from fedmerge.models.pretrained import Pretrained
from fedmerge.records.atomic_files import write_tensors
from fedmerge.records.model_tensors import digest


def mlp(seed, classes=4, hidden=6):
    return build_model("mlp", (5,), classes, seed=seed, hidden=[hidden])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "base.safetensors"
    write_tensors(path, mlp(1).state_dict())
    return path


def put(model, source, **settings):
    return Pretrained(str(source), **settings).put_into(model, (5,), 4).state_dict()


def names(model):
    return list(model.state_dict())


def test_every_tensor_is_that_of_the_base(file):
    found, base = put(mlp(0), file), mlp(1).state_dict()
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_a_part_stays_as_initialised_whatever_shape_the_base_has_there(file):
    last = names(mlp(0))[-1].rpartition(".")[0]
    fresh = mlp(0, classes=7)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    found = put(fresh, file, leave=(f"{last}.*",))
    for name, tensor in found.items():
        assert torch.equal(tensor, before[name] if name.startswith(last) else mlp(1).state_dict()[name])


def test_other_shapes_are_refused_with_the_pattern_that_leaves_them_out(file):
    with pytest.raises(ModelError, match=r"is \[4, 6\], in the model \[7, 6\].*pretrained_except"):
        put(mlp(0, classes=7), file)


def test_other_beginnings_are_told_and_mapped(tmp_path):
    path = tmp_path / "wrapped.safetensors"
    write_tensors(path, {f"module.{name}": tensor for name, tensor in mlp(1).state_dict().items()})
    with pytest.raises(ModelError, match=r'nearest is .module\..*model\.prefix = \{"module\." = ""\} makes'):
        put(mlp(0), path)
    found = put(mlp(0), path, prefix=(("module.", ""),))
    assert all(torch.equal(found[name], tensor) for name, tensor in mlp(1).state_dict().items())


def test_what_only_one_of_the_two_has_is_refused(tmp_path):
    state = dict(mlp(1).state_dict())
    write_tensors(tmp_path / "more.safetensors", {**state, "extra.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match=r"the model has no 'extra\.weight'"):
        put(mlp(0), tmp_path / "more.safetensors")
    first = names(mlp(0))[0]
    del state[first]
    write_tensors(tmp_path / "less.safetensors", state)
    with pytest.raises(ModelError, match=f"lacks '{first}'"):
        put(mlp(0), tmp_path / "less.safetensors")


def test_a_pattern_that_fits_nothing_is_refused(file):
    with pytest.raises(UnknownName, match=r"pretrained_except.*'haed\.\*'"):
        put(mlp(0), file, leave=("haed.*",))


def test_values_that_no_model_can_start_from_are_refused(tmp_path):
    state = {name: torch.full_like(tensor, float("nan")) for name, tensor in mlp(1).state_dict().items()}
    write_tensors(tmp_path / "nan.safetensors", state)
    with pytest.raises(ModelError, match="NaN"):
        put(mlp(0), tmp_path / "nan.safetensors")


def test_half_precision_becomes_that_of_the_model(tmp_path):
    write_tensors(tmp_path / "half.safetensors", {n: t.half() for n, t in mlp(1).state_dict().items()})
    found = put(mlp(0), tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(tensor, mlp(1).state_dict()[name].half().float()) for name, tensor in found.items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.out = nn.Linear(2, 3, bias=False)
        self.out.weight = self.embedding.weight


def test_a_tied_tensor_may_stand_in_the_file_once(tmp_path):
    write_tensors(tmp_path / "tied.safetensors", {"out.weight": torch.full((3, 2), 7.0)})
    model = Tied()
    put(model, tmp_path / "tied.safetensors")
    assert model.embedding.weight.eq(7).all()
    assert model.embedding.weight is model.out.weight


def test_a_file_that_has_changed_is_refused(file):
    known = digest(file)
    write_tensors(file, mlp(2).state_dict())
    with pytest.raises(ModelError, match="has changed"):
        put(mlp(0), file, digest=known)


def test_a_factory_returns_a_module_or_a_state(tmp_path, monkeypatch):
    (tmp_path / "base_maker.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def module(num_classes):\n    return nn.Linear(5, num_classes)\n"
        "def state(input_shape):\n    return {'weight': torch.ones(4, *input_shape), 'bias': torch.ones(4)}\n"
        "def nothing():\n    return 3\n"
        "def broken():\n    raise KeyError('x')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert put(nn.Linear(5, 4), "base_maker:state")["weight"].eq(1).all()
    before = torch.get_rng_state()
    fresh = nn.Linear(5, 4)
    torch.set_rng_state(before)
    assert not put(nn.Linear(5, 4), "base_maker:module")["weight"].eq(fresh.weight).all()
    with pytest.raises(ModelError, match="returned a int"):
        put(nn.Linear(5, 4), "base_maker:nothing")
    with pytest.raises(ModelError, match=r"fails \(KeyError"):
        put(nn.Linear(5, 4), "base_maker:broken")
