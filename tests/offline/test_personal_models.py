"""Models of clients' own, as modules."""

import copy

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import BadUpdate, InvalidOption, UnknownName
from tests.federation import tiny_model


def trained(seed, places=None):
    """A copy of the tiny model that has moved, at some places only where these are given."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(seed)
    for i, parameter in enumerate(model.parameters()):
        if places is None or i in places:
            parameter.data += torch.randn(parameter.shape, generator=generator)
    return model


def equal(one, other):
    return all(torch.allclose(t, other.state_dict()[n], atol=1e-6) for n, t in one.state_dict().items())


@pytest.mark.parametrize("method", ["emr", "tall_masks"])
def test_clients_that_trained_other_layers_get_their_models_back(method):
    models = [trained(0, (0, 1)), trained(1, (2, 3)), trained(2, (4, 5))]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    own = fedmerge.personal_models(models, method, base=tiny_model(), weights=[1, 5, 2])
    if method == "tall_masks":
        assert [equal(one, model) for one, model in zip(own, models, strict=True)] == [True] * 3
    assert all(one is not model for one, model in zip(own, models, strict=True))
    for state, model in zip(before, models, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    # Layers that a client has not trained are the base's.
    assert torch.equal(own[0][3].weight, tiny_model()[3].weight)
    assert not torch.equal(own[0][0].weight, tiny_model()[0].weight)


def test_they_are_the_shared_model_under_a_mask_and_a_number():
    base, models = tiny_model(), [trained(i) for i in range(3)]
    shared = fedmerge.merge(models, "emr", base=base)
    for one, model in zip(fedmerge.personal_models(models, "emr", base=base), models, strict=True):
        ratios = []
        for name, parameter in one.named_parameters():
            start, end = base.get_parameter(name), shared.get_parameter(name)
            moved = parameter != start
            assert torch.equal(moved, (model.get_parameter(name) - start).sign() == (end - start).sign()), name
            ratios.append(((parameter - start) / (end - start))[moved])
        joined = torch.cat(ratios)
        torch.testing.assert_close(joined, joined.mean().expand_as(joined), rtol=1e-3, atol=1e-3)


def test_one_alone_is_itself():
    assert equal(fedmerge.personal_models([trained(4)], base=tiny_model())[0], trained(4))


def test_shared_tensors_stay_shared():
    def tied(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        second.weight = first.weight
        return nn.Sequential(first, second)

    own = fedmerge.personal_models([tied(1), tied(2)], base=tied(0))
    assert all(torch.equal(one[0].weight, one[1].weight) for one in own)
    assert not torch.equal(own[0][0].weight, own[1][0].weight)


def test_an_edit_may_stand_in_front():
    models, base = [trained(i) for i in range(2)], tiny_model()
    plain = fedmerge.personal_models(models, "emr", base=base)
    trimmed = fedmerge.personal_models(models, "trim(density=0.3)+emr", base=base)
    assert (trimmed[0][0].weight == base[0].weight).sum() > (plain[0][0].weight == base[0].weight).sum()


@pytest.mark.parametrize(
    ("method", "options", "error", "told"),
    [
        ("fedavg", {}, InvalidOption, "fedavg makes one model for all: take emr or tall_masks"),
        ("regmean", {}, InvalidOption, "asks clients or the server's data for more"),
        ("emr+ridge_head", {}, InvalidOption, "asks clients or the server's data for more"),
        ("fedprox", {}, InvalidOption, "asks clients"),
        ("tall_masks", {"treshold": 0.1}, UnknownName, "threshold"),
        ("tall_masks", {"threshold": -1.0}, InvalidOption, "threshold must lie in"),
    ],
)
def test_what_makes_no_models_of_clients_is_refused(method, options, error, told):
    with pytest.raises(error, match=told):
        fedmerge.personal_models([trained(0), trained(1)], method, base=tiny_model(), **options)


def test_a_base_of_another_shape_and_negative_weights_are_refused():
    with pytest.raises(BadUpdate):
        fedmerge.personal_models([trained(0)], base=nn.Linear(2, 2))
    with pytest.raises((InvalidOption, BadUpdate), match="-1"):
        fedmerge.personal_models([trained(0), trained(1)], base=tiny_model(), weights=[1, -1])
