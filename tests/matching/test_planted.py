"""A model and a copy of it with other orders of neurons merge to the function that both have."""

from __future__ import annotations

import copy

import pytest
import torch

import fedmerge
from fedmerge.permutations import trace
from tests.permutations.zoo_of_models import MODELS, calibrate, difference, free_perms, permuted

OPTIONS = {"pfnm": {"class_aware": False, "gamma": 1e-3}}
WEIGHTS = ("rebasin", "otfusion", "c2m3", "gamf", "pfnm")
CONVOLUTIONAL = [name for name, model in MODELS.items() if model.convolutional]


def recovered(name, method, seed, *, copies=1, data=None, weights=None, **options):
    """How far the merge of a model with permuted copies of itself is from it."""
    model, batch = MODELS[name].make(seed)
    if data is not None:
        calibrate(model, data)  # norms are measured again after the merge, where there are data
    spec = trace(model, batch)
    moved = [permuted(model, spec, free_perms(spec, 10 * seed + i)) for i in range(copies)]
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (model, *moved)]
    given = {} if data is None else {"data": [data]}
    options = {**OPTIONS.get(method, {}), **options}
    merged = fedmerge.merge([model, *moved], method, example=batch, weights=weights, **given, **options)
    for one, state in zip((model, *moved), before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in one.state_dict().items())
    assert {n: t.shape for n, t in merged.state_dict().items()} == {n: t.shape for n, t in before[0].items()}
    return difference(model, merged, batch)


def samples(name, images=64):
    generator = torch.Generator().manual_seed(5)
    shape = MODELS[name].make()[1].shape[1:]
    return torch.randn((images if len(shape) == 3 else 512, *shape), generator=generator)


@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_by_weights(name, method):
    assert recovered(name, method, 1 + WEIGHTS.index(method) % 2) < 1e-4  # of two draws of each model


def _by_activations():
    for name in CONVOLUTIONAL:
        for method in ("rebasin", "otfusion"):
            yield name, method


@pytest.mark.parametrize(("name", "method"), list(_by_activations()))
def test_by_activations(name, method):
    assert recovered(name, method, 1 + WEIGHTS.index(method) % 2, data=samples(name), ground="activations") < 1e-4


@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("name", ["lenet", "resnet20", "bilstm", "encoder"])
def test_of_four_models_with_unequal_weights(name, method):
    assert recovered(name, method, 1, copies=3, weights=[1, 5, 2, 3]) < 1e-4


@pytest.mark.parametrize("fusion", ["successive", "anchor", "barycentre"])
@pytest.mark.parametrize("importance", ["uniform", "l1", "l2"])
def test_every_way_of_otfusion(fusion, importance):
    assert recovered("lenet", "otfusion", 1, copies=2, fusion=fusion, importance=importance) < 1e-4


def test_otfusion_by_sinkhorn():
    assert recovered("mlp", "otfusion", 1, solver="sinkhorn", regularization=1e-3) < 1e-3


def test_averages_without_matching_do_not():
    """The planted orders are such that a plain average is another function."""
    for name in MODELS:
        model, batch = MODELS[name].make(1)
        spec = trace(model, batch)
        merged = fedmerge.merge([model, permuted(model, spec, free_perms(spec, 10))], "fedavg")
        assert difference(model, merged, batch) > 1e-2, name


@pytest.mark.parametrize("method", ["rebasin", "c2m3", "otfusion"])
def test_heads_and_groups_of_norms_are_found(method):
    """Blocks alone are re-ordered."""
    for name in ("encoder", "resnet20_group_norm", "swin"):
        model, batch = MODELS[name].make(3)
        spec = trace(model, batch)
        perms = spec.identity()
        for i, group in enumerate(spec.groups):
            if group.inner:
                perms[i] = torch.arange(group.size).roll(1)
        other = permuted(model, spec, perms)
        merged = fedmerge.merge([model, other], method, example=batch)
        assert difference(model, merged, batch) < 1e-4, name


@pytest.mark.parametrize("method", ["rebasin", "otfusion", "c2m3", "gamf"])
def test_noise_on_the_copy_does_not_hide_the_order(method):
    """The merged weights lie halfway between the model and its noisy copy."""
    model, batch = MODELS["lenet"].make(4)
    spec = trace(model, batch)
    generator = torch.Generator().manual_seed(0)
    noise = {n: 0.02 * torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}
    noisy = {n: t + noise[n] for n, t in model.state_dict().items()}
    other = permuted(model, spec, spec.identity())
    other.load_state_dict(spec.apply(noisy, free_perms(spec, 4)))
    wanted = {n: t + noise[n] / 2 for n, t in model.state_dict().items()}
    merged = fedmerge.merge([model, other], method, example=batch).state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, msg=f"{name} by {method}")


@pytest.mark.parametrize(
    ("name", "method"), [("mlp", "zipit"), ("lenet", "zipit"), ("vgg", "zipit"), ("mlp", "cca"), ("lenet", "cca")]
)
def test_by_correlations(name, method):
    options = {"budget": 0.0} if method == "zipit" else {"gamma": 1e-6}
    assert recovered(name, method, 1, data=samples(name, 600), weights=[1, 5], **options) < 1e-3


@pytest.mark.parametrize("name", ["bilstm", "encoder", "vit"])
def test_layers_grow_only_where_the_grown_model_runs(name):
    """Both directions of an LSTM have one width, and an embedding a multiple of its heads."""
    (one, batch), (other, _) = MODELS[name].make(1), MODELS[name].make(2)
    merged = fedmerge.merge([one, other], "pfnm", class_aware=False, gamma=50.0, example=batch)
    with torch.no_grad():
        assert torch.isfinite(merged.eval()(batch)).all()


@pytest.mark.parametrize("method", ["pfnm", "fedma"])
def test_transposed_convolutions_let_neurons_out_along_their_second_axis(method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 6, 1),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(6, 5, 2, 2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(5, 3, 1),
    )
    x = torch.randn(3, 2, 4, 4)
    spec = trace(model, x)
    others = [permuted(model, spec, free_perms(spec, seed)) for seed in (1, 2)]
    merged = fedmerge.merge([model, *others], method, example=x, class_aware=False, gamma=1e-3)
    assert difference(model, merged, x) < 1e-4


class _Layers(torch.nn.Module):
    """Of the lower of two recurrent layers nothing is heard: one module holds both."""

    def __init__(self):
        super().__init__()
        self.both, self.out = torch.nn.GRU(4, 5, 2, batch_first=True, bidirectional=True), torch.nn.Linear(10, 3)

    def forward(self, x):
        return self.out(self.both(x)[0][:, -1])


@pytest.mark.parametrize("method", ["zipit", "cca"])
def test_neurons_that_cannot_be_heard_are_found_by_their_weights(method):
    torch.manual_seed(0)
    model, x = _Layers().eval(), torch.randn(64, 6, 4)
    spec = trace(model, x)
    others = [permuted(model, spec, free_perms(spec, seed)) for seed in (1, 2)]
    merged = fedmerge.merge([model, *others], method, example=x, data=[x])
    assert difference(model, merged, x) < 1e-3


class _Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.up, self.down = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
        self.out = torch.nn.Linear(6, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, words):
        return self.out(self.down(torch.relu(self.up(self.words(words)))))


@pytest.mark.parametrize("gamma", [None, 100.0])
def test_a_tied_tensor_does_not_grow_where_it_would_hear_the_others_neurons(gamma):
    torch.manual_seed(0)
    model, x = _Tied(), torch.randint(0, 11, (9, 5))
    same = [copy.deepcopy(model) for _ in range(3)]
    merged = fedmerge.merge(same, "pfnm", example=x, class_aware=False, gamma=gamma)
    assert difference(model, merged, x) < 1e-4
