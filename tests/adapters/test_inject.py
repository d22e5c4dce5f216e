"""Adapters go into a model and out of it without a change of its outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge.adapters import find_pairs, fold, folded_state, lora, scalings
from fedmerge.errors import AdapterError, InvalidOption, UnknownName
from fedmerge.layout import Layout


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv2d(1, 3, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(27, 4)

    def forward(self, x):
        return self.fc(self.norm(self.conv(self.embed(x)[:, None])).flatten(1))


@pytest.fixture
def base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Words()


X = torch.tensor([[1, 2, 3, 4, 5, 0], [9, 8, 7, 6, 10, 0]])


def disturbed(model, seed=1):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return model


def test_a_fresh_adapter_changes_no_output_and_trains_alone(base):
    model = lora(base, rank=2, alpha=6)
    torch.testing.assert_close(model.eval()(X), base.eval()(X), rtol=0, atol=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        "embed.lora_embedding_A.default", "embed.lora_embedding_B.default",
        "conv.lora_A.default.weight", "conv.lora_B.default.weight",
        "fc.lora_A.default.weight", "fc.lora_B.default.weight",
    }  # fmt: skip
    layout = Layout.of_module(model)
    assert set(layout.travelling(model.state_dict())) == trained  # neither the base nor its batch norms
    assert set(scalings(model).values()) == {3.0}
    assert scalings(lora(base, 4, 8, rank_stabilized=True)).popitem()[1] == 4.0
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_folding_gives_the_same_outputs_and_the_plain_module(base):
    model = disturbed(lora(base, rank=2, alpha=6)).eval()
    plain = fold(model).eval()
    torch.testing.assert_close(plain(X), model(X), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain(X), base.eval()(X), atol=1e-3)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert all(parameter.requires_grad for parameter in plain.parameters())
    state = folded_state(model.state_dict(), scalings(model))
    torch.testing.assert_close(state["fc.base_layer.weight"], plain.fc.weight)
    with pytest.raises(AdapterError, match="no adapter"):
        fold(plain)
    with pytest.raises(AdapterError, match="tells the scaling"):
        folded_state(model.state_dict(), {})


def test_gradients_reach_the_adapter_and_train_it(base):
    model = lora(base, rank=2, alpha=4)
    model(X).square().sum().backward()
    assert model.fc.base_layer.weight.grad is None
    assert float(model.fc.lora_B["default"].weight.grad.abs().sum()) > 0
    assert float(model.embed.lora_embedding_A["default"].grad.abs().sum()) > 0


def test_the_first_a_belongs_to_the_seed_and_no_global_draw_is_used(base):
    before = torch.random.get_rng_state()
    one, two, other = (lora(base, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["fc.lora_A.default.weight"], other["fc.lora_A.default.weight"])


def test_targets_name_layers_by_pattern_or_by_the_end_of_their_name(base):
    nested = nn.ModuleDict({"body": base})
    for targets, layers in ((["fc"], {"body.fc"}), (["*.conv", "fc"], {"body.conv", "body.fc"})):
        assert {pair.layer for pair in find_pairs(lora(nested, targets=targets).state_dict())} == layers
    model = lora(base, targets=["conv"], train=["fc", "norm.weight"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        "conv.lora_A.default.weight", "conv.lora_B.default.weight", "fc.weight", "fc.bias", "norm.weight",
    }  # fmt: skip
    with pytest.raises(UnknownName, match="layer in targets 'fcc'"):
        lora(base, targets=["fcc"])
    assert find_pairs(lora(nn.Linear(3, 2), rank=1).state_dict())[0].layer == ""


def test_what_cannot_be_honoured_is_refused(base):
    with pytest.raises(InvalidOption, match="rank of an adapter"):
        lora(base, rank=0)
    with pytest.raises(InvalidOption, match="alpha of an adapter"):
        lora(base, alpha=float("nan"))
    with pytest.raises(AdapterError, match="adapters already"):
        lora(lora(base))
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(AdapterError, match="layer '0': a convolution with 2 groups"):
        lora(grouped, targets=["0"])
    assert {pair.layer for pair in find_pairs(lora(grouped).state_dict())} == {"2"}
    with pytest.raises(AdapterError, match="max_norm"):
        lora(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)))
    with pytest.raises(InvalidOption, match="leaves no layer"):
        lora(base, targets=["fc"], train=["fc"])
    with pytest.raises(UnknownName, match="targets"):
        lora(nn.Sequential(nn.LSTM(3, 2)))
