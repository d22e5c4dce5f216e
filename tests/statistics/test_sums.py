"""Gram matrices, class counts and activations against plain sums."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge import BadUpdate, compute_statistics
from fedmerge.errors import InvalidOption, UnknownName
from fedmerge.statistics import Activations, ClassCounts, Gram
from tests.statistics.brute_force import kfac
from tests.statistics.zoo import made, sequences


@pytest.mark.parametrize("name", ["mlp", "no bias", "cnn", "dilated", "oblong", "reflect", "conv1d", "batch norm"])
def test_grams_are_mean_products_of_input_rows(name):
    model, x, y = made(name)
    got = Gram().measure(model.double(), [(x.double(), y)], None)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv1d)]
    assert list(got) == [f"{layer}.weight" for layer in layers]
    for layer in layers:
        total, _ = kfac(model, layer, x, y)  # a sum over positions: the mean has a 1 in its last place
        module = model.get_submodule(layer)
        with torch.no_grad():
            seen = {}
            module.register_forward_hook(lambda _, __, z, seen=seen: seen.__setitem__("z", z))
            model.eval()(x.double())
        positions = 1 if isinstance(module, nn.Linear) else seen["z"][0, 0].numel()
        torch.testing.assert_close(got[f"{layer}.weight"], total / positions)


def test_recurrent_weights_have_grams_of_their_own():
    model, tokens, labels = sequences()[0]
    got = Gram().measure(model.double(), [(tokens, labels)], None)
    assert set(got) == {f"lstm.weight_{g}_l{i}" for g in ("ih", "hh") for i in (0, 1)} | {"output.weight"}
    embedded = model.embedding(tokens).flatten(0, 1).detach()
    rows = torch.cat([embedded, torch.ones(len(embedded), 1)], 1)
    torch.testing.assert_close(got["lstm.weight_ih_l0"], rows.T @ rows / len(rows))
    states = model.lstm(model.embedding(tokens))[0].detach().flatten(0, 1)
    rows = torch.cat([states, torch.ones(len(states), 1)], 1)
    torch.testing.assert_close(got["output.weight"], rows.T @ rows / len(rows))


def test_class_counts():
    model = nn.Linear(2, 4)
    x = torch.randn(5, 2)
    got = ClassCounts().measure(model, [(x[:2], torch.tensor([0, 3])), (x[2:], torch.tensor([3, 3, 1]))], None)
    assert got["class_counts"].tolist() == [1, 1, 0, 3]
    model, tokens, labels = sequences()[0]
    got = ClassCounts().measure(model, [(tokens, labels)], None)
    assert got["class_counts"].sum() == labels.numel()
    assert len(got["class_counts"]) == 5


@pytest.mark.parametrize("labels", [torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])])
def test_labels_that_are_no_classes_are_named(labels):
    with pytest.raises(InvalidOption, match="whole numbers"):
        ClassCounts().measure(nn.Linear(2, 4), [(torch.randn(2, 2), labels)], None)


def test_counts_may_be_given_as_a_plain_list():
    models = [nn.Linear(2, 3), nn.Linear(2, 3)]
    grams = [{"weight": torch.eye(3)}, {"weight": torch.eye(3)}]
    given = [
        {"class_counts": counts, "gram": g}
        for counts, g in zip(([1, 0, 2], torch.tensor([0, 5, 2])), grams, strict=True)
    ]
    merged = fedmerge.merge(models, "maecho", statistics=given)
    torch.testing.assert_close(merged.weight[0], models[0].weight[0])
    torch.testing.assert_close(merged.weight[1], models[1].weight[1])
    for wrong in ("many", {"other": 1}):
        with pytest.raises(BadUpdate, match="class_counts"):
            fedmerge.merge(models, "maecho", statistics=[given[0] | {"class_counts": wrong}, given[1]])


@pytest.mark.parametrize("counts", [[0, 0], [-1, 2], [[1, 2]]])
def test_counts_that_cannot_be(counts):
    with pytest.raises(InvalidOption):
        ClassCounts().check({"class_counts": torch.tensor(counts)}, {})


@pytest.mark.parametrize("name", ["mlp", "cnn", "groups", "conv1d"])
@pytest.mark.parametrize("size", [1, 4])
def test_moments_of_outputs(name, size):
    model, x, y = made(name)
    model = model.double().eval()
    got = Activations(samples=3).measure(model, list(zip(x.double().split(size), y.split(size), strict=True)), None)
    for layer, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
            continue
        seen = {}
        handle = module.register_forward_hook(lambda _, __, z, seen=seen: seen.__setitem__("z", z.detach()))
        model(x.double())
        handle.remove()
        z = seen["z"].flatten(2) if seen["z"].ndim > 2 else seen["z"][..., None]  # [B, out, T]
        flat = z.transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(got[f"{layer}.weight.mean"], flat.mean(0))
        torch.testing.assert_close(got[f"{layer}.weight.var"], flat.var(0, correction=0))
        wanted = torch.stack([z[i, :, i % z.shape[2]] for i in range(3)])
        torch.testing.assert_close(got[f"{layer}.weight.samples"], wanted)


def test_activations_of_another_model_are_refused():
    model, x, y = made("mlp")
    value = Activations().measure(model, [(x, y)], None)
    Activations().check(value, model.state_dict())
    with pytest.raises(InvalidOption, match="units"):
        Activations().check(value, {"0.weight": torch.zeros(9, 4), "2.weight": torch.zeros(3, 5)})
    with pytest.raises(InvalidOption, match="no weight"):
        Activations().check(value, {})
    with pytest.raises(InvalidOption):
        Activations(samples=-1)


def test_statistics_by_name_and_with_settings():
    model, x, y = made("mlp")
    got = compute_statistics(model, [(x, y)], ["class_counts", Gram(layers=("0",)), "activations"])
    assert set(got) == {"class_counts", "gram", "activations"}
    assert set(got["gram"]) == {"0.weight"}
    with pytest.raises(UnknownName, match="gramm"):
        compute_statistics(model, [(x, y)], ["gramm"])
