"""Models whose outputs or vocabularies differ in size are refused in words that say how to merge the rest."""

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import BadUpdate


def mlp(classes, hidden=8):
    return nn.Sequential(nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def words(vocabulary):
    return nn.Sequential(nn.Embedding(vocabulary, 6), nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))


def image(classes):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, classes))


X, IDS, IMAGES = torch.randn(4, 5), torch.randint(0, 9, (4, 2)), torch.randn(4, 1, 4, 4)
CASES = {
    "heads": ([mlp(3), mlp(4)], X, "'2.weight'"),
    "heads and widths": ([mlp(3), mlp(4, 9)], X, "'2.weight'"),
    "the third": ([mlp(3), mlp(3), mlp(2)], X, "'2.weight'"),
    "vocabularies": ([words(9), words(11)], IDS, "'0.weight'"),
    "images": ([image(2), image(5)], IMAGES, "'3.weight'"),
}


@pytest.mark.parametrize(
    "method", ["otfusion", "pfnm(class_aware=false)", "fedma(class_aware=false)", "fedavg", "rebasin"]
)
@pytest.mark.parametrize("case", CASES)
def test_what_is_no_hidden_width_is_named(case, method):
    models, example, name = CASES[case]
    with pytest.raises(BadUpdate) as caught:
        fedmerge.merge(models, method, example=example)
    text = str(caught.value)
    assert name in text or "0.weight" in text
    assert "Outputs, classes and vocabularies" in text
    assert "leave them out" in text


def test_the_advice_works():
    torch.manual_seed(0)
    a, b = mlp(3), mlp(4, 8)
    merged = fedmerge.merge([a, b], "otfusion", example=X, leave_out=["2.*"])
    assert torch.equal(merged[2].weight, a[2].weight)
    assert not torch.equal(merged[0].weight, a[0].weight)
    shared = fedmerge.merge([words(9), words(11)], rows={"0.weight": [range(9), range(11)]})
    assert shared[0].weight.shape == (11, 6)


def test_hidden_widths_may_still_differ():
    merged = fedmerge.merge([mlp(3, 8), mlp(3, 10)], "otfusion", example=X)
    assert merged(X).shape == (4, 3)
