"""Routed models merged from files: what the file holds, and a module of it."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

import fedmerge
from fedmerge.models import build_model
from fedmerge.offline.merge_files import merge_files
from fedmerge.routing import RoutedModel


def test_a_file_of_a_routed_model_becomes_the_module_that_merge_gives(tmp_path):
    models = [build_model("mlp", (1, 8, 8), 10, seed=seed, hidden=[8]) for seed in range(3)]
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file, model in zip(files, models, strict=True):
        save_file({name: tensor.double() for name, tensor in model.state_dict().items()}, file)
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"inputs": x}, tmp_path / "data.safetensors")
    merge_files(
        files[1:],
        tmp_path / "routed.safetensors",
        model="mlp",
        method="wemoe",
        base=files[0],
        data=tmp_path / "data.safetensors",
        settings=["steps=2", "model.hidden=[8]"],
    )
    state = load_file(tmp_path / "routed.safetensors")
    assert all(t.dtype == torch.float64 for name, t in state.items() if name.startswith("model."))
    routed = RoutedModel.from_state(models[0], state)
    want = fedmerge.merge(models[1:], "wemoe", base=models[0], data=[x], steps=2)
    torch.testing.assert_close(routed(x), want(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(routed(x), routed.model(x))
