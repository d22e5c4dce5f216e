"""Linearised models: the laws of an expansion, and numbers found by differences."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fedmerge.errors import InvalidOption, ModelError, UnknownName
from fedmerge.models.tangent import Tangent, is_linearised, linearise, linearised_maker


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.tanh(self.embed(x)))


class Several(nn.Module):
    """Called with two arguments, returns a mapping in which not all are numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x, *, y):
        z = torch.tanh(self.a(x)) * self.b(y)
        return {"z": z, "largest": z.argmax(1), "name": "both"}


class NoForward(torch.autograd.Function):
    """Somebody's own, without a derivative that is taken forward."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Own(nn.Module):
    """Of a function of somebody's own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 2)

    def forward(self, x):
        return NoForward.apply(self.body(x))


def convolutional():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Dropout(0.5), nn.Linear(4, 2)),
    )


NUMBERS, TOKENS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 2, 3]])
PICTURES = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
MODELS = {
    "layers": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)), NUMBERS),
    "convolutions": (convolutional, PICTURES),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), ROWS),
    "recurrent": (lambda: nn.Sequential(nn.LSTM(4, 3, batch_first=True)), ROWS),
    "tied": (Tied, TOKENS),
}


def made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def moved(model, seed, size=0.3):
    """The model with parameters at a random distance from where it is linearised."""
    draws, model = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for name, start in model.start.items():
            model.get_parameter(name).copy_(start + size * torch.randn(start.shape, generator=draws))
    return model


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def mean_of(models):
    mean = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    mean.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    return mean


@pytest.mark.parametrize("kind", MODELS)
def test_where_it_is_expanded_it_is_the_model_and_so_is_its_gradient(kind):
    make, x = MODELS[kind]
    plain, model = made(make).eval(), linearise(made(make))
    expected, outputs = first(plain(x)), first(model(x))
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    expected.square().sum().backward()
    outputs.square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_outputs_of_a_mean_are_the_mean_of_the_outputs(kind):
    make, x = MODELS[kind]
    model = linearise(made(make))
    several = [moved(model, seed) for seed in range(3)]
    mean = sum(first(one(x)) for one in several) / 3
    torch.testing.assert_close(first(mean_of(several)(x)), mean, rtol=1e-4, atol=1e-5)
    plain = first(mean_of(several).plain(x)) - sum(first(one.plain(x)) for one in several) / 3
    assert plain.abs().max() > 1e-3  # which the model itself does not give


def test_the_numbers_are_those_of_differences():
    model = linearise(made(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))).double()
    x = torch.tensor([[0.5, -1.0], [2.0, 0.25]], dtype=torch.float64)
    start = {name: tensor.numpy().copy() for name, tensor in model.start.items()}
    change = {name: 0.5 * np.cos(np.arange(tensor.size)).reshape(tensor.shape) for name, tensor in start.items()}

    def function(step):
        a, b, c, d = (start[name] + step * change[name] for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
        return np.tanh(x.numpy() @ a.T + b) @ c.T + d

    step = 1e-5
    expected = function(0.0) + (function(step) - function(-step)) / (2 * step)
    model.load_state_dict({name: torch.from_numpy(start[name] + change[name]) for name in start})
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-8, atol=1e-9)
    assert np.abs(function(1.0) - expected).max() > 0.1


def test_some_parameters_are_linearised_and_others_go_through():
    make = MODELS["layers"][0]
    model = linearise(made(make), ["0", "*.bias"])
    assert model.linearised == ("0.weight", "0.bias", "2.bias", "3.bias")
    several = [moved(model, seed) for seed in range(2)]
    mean = sum(one(NUMBERS) for one in several) / 2
    torch.testing.assert_close(mean_of(several)(NUMBERS), mean, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        model.get_parameter("3.weight").mul_(2)
    doubled = made(make)
    with torch.no_grad():
        doubled[3].weight.mul_(2)
    torch.testing.assert_close(model(NUMBERS), doubled(NUMBERS))  # as the model is at its present weight


def test_the_last_layer_alone_is_linear_already():
    model = linearise(made(MODELS["layers"][0]), ["3"])
    model = moved(model, 1, 5.0)
    torch.testing.assert_close(model(NUMBERS), model.plain(NUMBERS))


def test_what_is_frozen_has_no_part_and_a_model_at_rest_is_linearised_whole():
    model = made(MODELS["layers"][0])
    model[0].requires_grad_(False)
    assert linearise(model).linearised == ("2.weight", "2.bias", "3.weight", "3.bias")
    assert len(linearise(model.requires_grad_(False)).linearised) == 6
    model[3].requires_grad_(True)
    with pytest.raises(InvalidOption, match="names no parameter that is trained"):
        linearise(model, ["0.*"])


def test_it_shares_the_models_tensors_and_names():
    plain = convolutional()
    names = list(plain.state_dict())
    model = linearise(plain)
    assert list(model.state_dict()) == names
    with torch.no_grad():
        plain[0].weight.zero_()
    assert not model.get_parameter("0.weight").any()
    assert model.start["0.weight"].any()
    assert model.plain is plain
    assert model.append == plain.append  # what it does not have itself it asks the model for
    assert not hasattr(model, "nothing of the kind")


def test_it_always_runs_as_in_use():
    model = linearise(convolutional()).train()
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    assert torch.equal(model(PICTURES), model(PICTURES))
    assert not any(part.training for part in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_linearised_around_the_same_point(again):
    model = moved(linearise(made(MODELS["layers"][0])), 1)
    other = again(model)
    assert torch.equal(other(NUMBERS), model(NUMBERS))
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
    assert not torch.equal(other(NUMBERS), model(NUMBERS))


def test_the_fixed_point_moves_to_other_types_with_the_model():
    model = linearise(nn.Linear(4, 2)).double()
    assert model.start["weight"].dtype == model(NUMBERS.double()).dtype == torch.float64


def test_arguments_and_outputs_of_any_form():
    model = linearise(made(Several))
    x, y = NUMBERS[:, :3], NUMBERS[:, :2]
    outputs, plain = model(x, y=y), model.plain(x, y=y)
    assert outputs["name"] == "both"
    assert torch.equal(outputs["largest"], plain["largest"])
    torch.testing.assert_close(outputs["z"], plain["z"])


def test_what_has_no_derivative_forward_is_told_and_may_stay_out():
    with pytest.raises(ModelError, match="Own cannot be linearised, for a part of it has no derivative"):
        linearise(Own())(NUMBERS[:, :3])
    normed = parametrizations.weight_norm(nn.Linear(4, 3))
    with pytest.raises(ModelError, match="_weight_norm_interface"):
        linearise(nn.Sequential(normed, nn.Tanh(), nn.Linear(3, 2)))(NUMBERS)
    model = linearise(nn.Sequential(normed, nn.Tanh(), nn.Linear(3, 2)), ["2"])  # nothing runs behind it
    assert model(NUMBERS).shape == (3, 2)


def test_what_fails_without_it_too_is_told_as_it_is():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linearise(nn.Linear(3, 2))(NUMBERS)


def test_outputs_without_numbers_are_told():
    class Nothing(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight).argmax(1)

    with pytest.raises(ModelError, match="returns a Tensor, in which no tensors of numbers"):
        linearise(Nothing(4, 2))(NUMBERS)


def test_it_keeps_its_widths():
    model = linearise(nn.Linear(4, 2))
    model.weight = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ModelError, match="keeps its widths"):
        model(NUMBERS)


def test_linearised_once_it_stays_so():
    model = linearise(nn.Linear(4, 2))
    assert linearise(model) is model
    with pytest.raises(InvalidOption, match="linearised already"):
        linearise(model, ["bias"])
    assert is_linearised(nn.Sequential(model))
    assert not is_linearised(model.plain)


def test_bad_patterns_are_told():
    with pytest.raises(UnknownName, match="wieght"):
        linearise(nn.Linear(4, 2), ["wieght"])
    with pytest.raises(InvalidOption, match="list of patterns"):
        linearise(nn.Linear(4, 2), "weight")
    with pytest.raises(ModelError, match="lazy layer"):
        linearise(nn.LazyLinear(2))


def test_a_maker_makes_them_around_what_it_makes():
    maker = linearised_maker(Tied, ["embed"])
    assert isinstance(maker(), Tangent)
    assert linearised_maker(Tied, ()) is Tied
