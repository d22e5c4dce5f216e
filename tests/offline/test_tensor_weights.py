"""Weights that differ from tensor to tensor, 0 included."""

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import BadUpdate, InvalidOption, UnknownName

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))


def net(seed, classes=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, classes))
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].num_batches_tracked.fill_(seed)
    return model


def loader(seed, classes=3):
    return [(torch.randn(12, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(12) % classes)]


def weighted(models, name, weights):
    total = sum(weights)
    return sum(w / total * model.state_dict()[name] for model, w in zip(models, weights, strict=True))


def test_each_pattern_has_weights_of_its_own():
    models = [net(1), net(2)]
    merged = fedmerge.merge(
        models, weights=[1, 3], pattern_weights={"4.*": [1, 0], "0": [0.2, 0.8], "?.weight": [1, 1]}
    ).state_dict()
    for name, weights in (
        ("4.weight", [1, 0]),
        ("4.bias", [1, 0]),
        ("0.weight", [0.2, 0.8]),
        ("1.weight", [1, 1]),
        ("1.bias", [1, 3]),
        ("1.running_mean", [1, 3]),
        ("3.weight", [1, 1]),
    ):
        torch.testing.assert_close(merged[name], weighted(models, name, weights))
    assert torch.equal(merged["4.weight"], models[0][4].weight)
    assert merged["1.num_batches_tracked"] == 2
    buffers = fedmerge.merge(models, "median", pattern_weights={"1.running_*": [0, 1]})
    assert torch.equal(buffers[1].running_mean, models[1][1].running_mean)


def test_a_model_of_weight_zero_may_have_another_shape():
    models = [net(1, 3), net(2, 5), net(3, 5)]
    merged = fedmerge.merge(models, pattern_weights={"4": [0, 1, 3]})
    torch.testing.assert_close(merged[4].bias, (models[1][4].bias + 3 * models[2][4].bias) / 4)
    assert merged(X).shape == (8, 5)
    with pytest.raises(BadUpdate, match=r"'4\.(weight|bias)' has shape"):
        fedmerge.merge(models, pattern_weights={"4": [1, 1, 1]})


def test_a_models_infinite_numbers_do_no_harm_where_it_has_no_part():
    models = [net(1), net(2)]
    with torch.no_grad():
        models[1][4].weight.fill_(torch.nan)
    merged = fedmerge.merge(models, pattern_weights={"4": [1, 0]})
    assert torch.equal(merged[4].weight, models[0][4].weight)


@pytest.mark.parametrize("method", ["fisher", "regmean", "slerp", "ties(scope=tensor)", "gradient_matching", "fednova"])
def test_patterns_that_say_what_all_weights_say_change_nothing(method):
    models, base = [net(1), net(2)], net(5)
    given = {"base": base, "clients": [loader(1), loader(2)]}
    if method == "fednova":
        given = {"base": base, "statistics": [{"local_steps": 2}, {"local_steps": 5}]}
    whole = fedmerge.merge(models, method, weights=[1, 2], **given).state_dict()
    apart = fedmerge.merge(models, method, pattern_weights={"0": [1, 2], "*": [10, 20]}, **given).state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(apart[name], tensor)


def test_curvature_decides_among_those_that_have_a_part():
    models = [net(1), net(2), net(3)]
    loaders = [loader(seed) for seed in (1, 2, 3)]
    for method in ("fisher", "regmean"):
        two = fedmerge.merge(models[1:], method, clients=loaders[1:], weights=[1, 2])
        part = fedmerge.merge(models, method, clients=loaders, pattern_weights={"3": [0, 1, 2]})
        torch.testing.assert_close(part[3].weight, two[3].weight)
        whole = fedmerge.merge(models, method, clients=loaders)
        torch.testing.assert_close(part[0].weight, whole[0].weight)
        assert not torch.allclose(part[3].weight, whole[3].weight)


def test_what_is_left_out_may_stand_beside_weights():
    models = [net(1, 3), net(2, 5)]
    merged = fedmerge.merge(models, leave_out=["4"], pattern_weights={"0": [0, 1]})
    assert torch.equal(merged[0].weight, models[1][0].weight)
    assert torch.equal(merged[4].weight, models[0][4].weight)
    torch.testing.assert_close(merged[3].weight, (models[0][3].weight + models[1][3].weight) / 2)


WHOLE = ["rebasin", "otfusion", "krum", "fedavg+ridge_head", "ties", "fedavg+server_momentum", "trim+fedavg"]


@pytest.mark.parametrize("method", [*WHOLE, "slerp(scope=model)", "soup(recipe=greedy)", "fisher(normalize=1.0)"])
def test_methods_that_look_at_whole_models_are_refused_by_name(method):
    models = [net(1), net(2), net(3)]
    with pytest.raises(InvalidOption) as caught:
        fedmerge.merge(models, method, pattern_weights={"4": [1, 0, 0]}, base=net(5), example=X)
    assert method in str(caught.value)
    assert "fedavg" in str(caught.value).split("take one of")[1]
    named = str(caught.value).split("take one of")[1].split(", ")
    assert not {"otfusion", "krum", "fedprox", "afl", "regmean_plusplus"} & {name.strip() for name in named}


def test_weights_that_nothing_can_have_are_told():
    models = [net(1), net(2)]
    for given, words in (
        ({"4": [0, 0]}, r"pattern_weights\['4'\] is 0 for all"),
        ({"4": [1]}, "has 1 entries for 2 models"),
        ({"4": ["a", 1]}, r"pattern_weights\['4'\]\[0\] must be a number"),
        ({"4": None}, "a number for each model"),
        ([1, 2], "must be weights by pattern"),
    ):
        with pytest.raises(InvalidOption, match=words):
            fedmerge.merge(models, pattern_weights=given)
    with pytest.raises(UnknownName, match="pattern_weights 'heads'"):
        fedmerge.merge(models, pattern_weights={"heads": [1, 0]})
    for bad in ([-1, 2], [float("nan"), 1]):
        with pytest.raises(BadUpdate):
            fedmerge.merge(models, pattern_weights={"4": bad})
    with pytest.raises(InvalidOption, match=r"weight and bias together.*'0'"):
        fedmerge.merge(models, "regmean", pattern_weights={"0.weight": [1, 0]}, clients=[loader(1), loader(2)])
    less = fedmerge.merge(models, "task_arithmetic", base=net(5), pattern_weights={"4": [-1, 0]})
    assert not torch.equal(less[4].weight, models[0][4].weight)  # subtracted, where a method can
