"""Routed models: every example gets the parameters that its gate chooses, and they are modules like any other."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fedmerge.errors import InvalidOption
from fedmerge.routing import Gate, RoutedModel, Routing
from fedmerge.state import trained_names


def drawn(model, names, count=2, seed=0):
    """Experts that add noise to these parameters."""
    draw, known = torch.Generator().manual_seed(seed), dict(model.named_parameters())
    return tuple({n: torch.randn(known[n].shape, generator=draw) for n in names} for _ in range(count))


def with_expert(model, expert):
    """The model as one expert alone makes it."""
    moved = copy.deepcopy(model)
    for name, parameter in moved.named_parameters():
        parameter.data += expert.get(name, 0)
    return moved


def picking(width, looks_at, middle):
    """A certain gate: the first expert where the first number lies above the middle, else the second."""
    weight = torch.zeros(2, width)
    weight[:, 0] = torch.tensor([1e6, -1e6])
    return Gate(((weight, -weight[:, 0] * middle),), looks_at, softmax=True)


class Attends(nn.Module):
    """A transformer's layer, whose outputs are averaged."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x).mean(1)


class Keywords(nn.Module):
    """Takes keywords and gives several outputs."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 3)

    def forward(self, x, shift=None):
        found = self.line(x)
        return {"logits": found if shift is None else found + shift, "hidden": x}


MODELS = {
    "linear layer": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "2", 5, (6, 4)),
    "block": (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)), "0", 4, (6, 4)),
    "tokens": (Attends, "layer.linear1", 4, (6, 7, 4)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)), "0", 2, (6, 2, 3, 3)),
    "the whole": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), "", 4, (6, 4)),
    "seen by the head": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "", 5, (6, 4)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_certain_gate_picks_an_expert(kind):
    make, site, width, shape = MODELS[kind]
    torch.manual_seed(3)
    model = make().eval()
    looks_at = "2" if kind == "seen by the head" else site
    names = [name for name in trained_names(model) if name.startswith(site)]
    experts, x = drawn(model, names), torch.randn(shape)
    seen = []
    handle = model.get_submodule(looks_at).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    wants = torch.stack([with_expert(model, expert)(x) for expert in experts])
    model(x)
    handle.remove()
    given = seen[-1]
    if given.ndim > 2:
        given = given.mean((2, 3)) if given.ndim == 4 else given.mean(1)
    middle = given[:, 0].sort().values[2:4].mean()
    first = given[:, 0] > middle
    assert 0 < int(first.sum()) < len(x)
    got = RoutedModel(model, Routing({site: picking(width, looks_at, middle)}, experts, (0, 1)))(x)
    torch.testing.assert_close(got, torch.where(first[:, None], wants[0], wants[1]), rtol=1e-5, atol=1e-5)


def test_linear_layers_mix_parameters_as_numpy_does():
    torch.manual_seed(1)
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    experts, start = drawn(layer, ["weight", "bias"]), {"weight": torch.randn(2, 3)}
    gate = Gate(((torch.randn(3, 3), torch.randn(3)), (torch.randn(2, 3), torch.randn(2))), "0", normalise=True)
    net = nn.Sequential(layer)
    named = tuple({f"0.{n}": t for n, t in one.items()} for one in experts)
    got = RoutedModel(net, Routing({"0": gate}, named, (0, 1), {"0.weight": start["weight"]}))(x)
    for row, found in zip(x.numpy(), got.detach().numpy(), strict=True):
        seen = (row - row.mean()) / np.sqrt(row.var() + 1e-5)
        (w0, b0), (w1, b1) = [(w.numpy(), b.numpy()) for w, b in gate.layers]
        g = w1 @ np.maximum(w0 @ seen + b0, 0) + b1
        weight = start["weight"].numpy() + sum(g[i] * experts[i]["weight"].numpy() for i in range(2))
        bias = layer.bias.detach().numpy() + sum(g[i] * experts[i]["bias"].numpy() for i in range(2))
        np.testing.assert_allclose(found, weight @ row + bias, rtol=1e-4, atol=1e-5)


def routed(site="0", looks_at="0"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    gate = Gate(((torch.randn(2, 3), torch.zeros(2)),), looks_at, softmax=True)
    return RoutedModel(model, Routing({site: gate}, drawn(model, ["0.weight"]), (0, 4))).eval()


def test_no_example_depends_on_the_others_in_its_batch():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    for site, looks_at in (("0", "0"), ("", "")):
        model = routed(site, looks_at)
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]))


def test_it_is_copied_and_saved_like_any_module(tmp_path):
    model, x = routed(), torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(x), model(x))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    torch.save(model.state_dict(), tmp_path / "routed.pt")
    back = RoutedModel.from_state(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.load(tmp_path / "routed.pt"))
    assert torch.equal(back(x), model(x))
    assert back.routing.clients == (0, 4)


def test_keywords_and_several_outputs_pass_through():
    torch.manual_seed(0)
    model, x, shift = Keywords(), torch.randn(4, 3), torch.randn(4, 3)
    experts = drawn(model, ["line.weight"])
    for site in ("line", ""):
        gate = Gate(((torch.tensor([[9e5, 0, 0], [-9e5, 0, 0]]), torch.zeros(2)),), site, softmax=True)
        got = RoutedModel(model, Routing({site: gate}, experts, (0, 1)))(x, shift=shift)
        want = torch.stack([with_expert(model, one)(x, shift)["logits"] for one in experts])
        assert set(got) == {"logits", "hidden"}
        torch.testing.assert_close(got["logits"], torch.where(x[:, :1] > 0, want[0], want[1]))
        assert torch.equal(got["hidden"], x)


def test_gates_that_look_at_a_preference_make_plain_models():
    model = nn.Linear(2, 2)
    experts, x = drawn(model, ["weight"]), torch.randn(3, 2)
    routing = Routing({"": Gate()}, experts, (3, 5), preference=torch.zeros(2), own={5: torch.tensor([0.0, 1.0])})
    made = RoutedModel(model, routing)
    torch.testing.assert_close(made(x), model(x))
    torch.testing.assert_close(made.of_preference([1.0, 0.0])(x), with_expert(model, experts[0])(x))
    torch.testing.assert_close(made.of_client(5)(x), with_expert(model, experts[1])(x))
    assert type(made.of_client(5)) is nn.Linear
    with pytest.raises(InvalidOption, match="client 3 has no model of its own"):
        made.of_client(3)
    with pytest.raises(InvalidOption, match="2 numbers, one for each of clients"):
        made.of_preference([1.0])
    with pytest.raises(InvalidOption, match="look at its inputs"):
        routed().of_preference([1.0, 0.0])


def test_gradients_reach_gates_from_every_example():
    for site, looks_at in (("0", "0"), ("", "")):
        model, x = routed(site, looks_at), torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
        first, second = (
            torch.autograd.grad(model(part).square().sum(), model.parts.parameters()) for part in (x, x[:2])
        )
        rest = torch.autograd.grad(model(x[2:]).square().sum(), model.parts.parameters())
        for whole, one, other in zip(first, second, rest, strict=True):
            assert bool((whole != 0).any())
            torch.testing.assert_close(whole, one + other, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named():
    model, gate = nn.Sequential(nn.Linear(3, 3)), Gate(looks_at=None)
    with pytest.raises(InvalidOption, match="no module of this name"):
        RoutedModel(model, Routing({"9": gate}, ({},), (0,)))
    with pytest.raises(InvalidOption, match="does not fit the model"):
        RoutedModel(model, Routing({"0": gate}, ({"0.weight": torch.zeros(2)},), (0,)))
    with pytest.raises(InvalidOption, match="no routed model"):
        RoutedModel.from_state(model, model.state_dict())
    with pytest.raises(InvalidOption, match="no routing"):
        Routing.from_tensors({"facts": torch.tensor([1, 2], dtype=torch.uint8)})
    words = nn.Sequential(nn.Embedding(4, 3))
    seen = Gate(((torch.zeros(1, 1), torch.zeros(1)),), "0")
    with pytest.raises(InvalidOption, match="a gate looks at real numbers"):
        RoutedModel(words, Routing({"0": seen}, ({"0.weight": torch.zeros(4, 3)},), (0,)))(torch.tensor([1]))


def test_factors_stand_for_their_product():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    left, right = torch.randn(2, 1), torch.randn(1, 3)
    whole = Routing({"": Gate()}, ({"weight": left @ right},), (0,), preference=torch.ones(1))
    parts = Routing({"": Gate()}, ({"weight:left": left, "weight:right": right},), (0,), preference=torch.ones(1))
    torch.testing.assert_close(RoutedModel(model, parts)(x), RoutedModel(model, whole)(x))
    assert (whole.bytes, parts.bytes) == (24, 20)


def test_a_client_is_sent_its_own_expert_or_its_own_values_whichever_is_less():
    shared, one = {"w": torch.zeros(4, 4)}, {"w:left": torch.ones(4, 1), "w:right": torch.ones(1, 4)}
    own = {0: torch.tensor([1.0, 0.0]), 1: torch.tensor([0.5, 0.5]), 2: torch.zeros(2)}
    plain = Routing({"": Gate()}, (one, one), (0, 1), preference=torch.zeros(2), own=own)
    assert [plain.bytes_of(client, shared) for client in (0, 1, 2)] == [32, 64, 0]
    gate = Gate(((torch.eye(2), torch.zeros(2)),))
    assert Routing({"": gate}, (one, one), (0, 1), own=own).bytes_of(0, shared) == 64
