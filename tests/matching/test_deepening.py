"""Models made deeper: what they compute stays, and where it cannot the layer is named."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fedmerge.errors import ModelError
from fedmerge.matching.deepening import as_deep, deepened, shown_inputs
from fedmerge.matching.layer_chain import layers_of, matched_layers, similarity
from fedmerge.models import build_model

DRAWS = torch.Generator().manual_seed(0)
ROWS, PICTURES = torch.randn(16, 6, generator=DRAWS), torch.randn(4, 3, 16, 16, generator=DRAWS)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make()
        for part in model.modules():  # statistics that are not those of a new model
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.uniform_(-1, 1)
                part.running_var.uniform_(0.5, 2)
    return model


def mlp(*hidden):
    return seeded(lambda: build_model("mlp", (6,), 3, seed=len(hidden), hidden=list(hidden)))


def plain(depth, width, norm=False):
    """Convolutions on pictures, then half as large ones."""

    def some(taken, given):
        return [nn.Conv2d(taken, given, 3, padding=1), *([nn.BatchNorm2d(given)] if norm else []), nn.ReLU()]

    first = [layer for i in range(depth) for layer in some(width if i else 3, width)]
    second = [layer for _ in range(depth) for layer in some(width, width)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]
    return seeded(lambda: nn.Sequential(*first, nn.MaxPool2d(2), *second, *head))


def zoo(name, **options):
    return seeded(lambda: build_model(name, (3, 16, 16), 3, seed=0, **options))


PAIRS = {
    "linear layers": (lambda: mlp(5), lambda: mlp(9, 8, 7), ROWS),
    "of several widths": (lambda: mlp(5, 4), lambda: mlp(9, 9, 8, 9, 7), ROWS),
    "convolutions": (lambda: plain(1, 4), lambda: plain(3, 6), PICTURES),
    "batch norms": (lambda: plain(1, 4, norm=True), lambda: plain(2, 6, norm=True), PICTURES),
    "residual blocks": (lambda: zoo("resnet8", width=4), lambda: zoo("resnet20", width=8), PICTURES),
    "with group norms": (
        lambda: zoo("resnet8", width=4, norm="group"),
        lambda: zoo("resnet20", width=4, norm="group"),
        PICTURES,
    ),
    "attention": (lambda: zoo("vit", dim=8, depth=1), lambda: zoo("vit", dim=8, depth=3), PICTURES),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_it_computes_what_it_did(kind):
    shallow, deep, x = PAIRS[kind][0](), PAIRS[kind][1](), PAIRS[kind][2]
    before = [tensor.clone() for model in (shallow, deep) for tensor in model.state_dict().values()]
    found = deepened(shallow, deep, x)
    assert list(found.state_dict()) == list(deep.state_dict())
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))  # not what layers were told by
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(other), shallow.eval()(other), rtol=0, atol=1e-6)
    after = [tensor for model in (shallow, deep) for tensor in model.state_dict().values()]
    assert all(map(torch.equal, after, before))


def test_the_layers_that_go_in_by_hand():
    """Two layers of NumPy's, between which identities change nothing."""
    found = deepened(mlp(3), mlp(7, 7, 7), ROWS)
    (a, i, j, b) = [layer.weight.detach().numpy() for layer in found.layers]
    np.testing.assert_array_equal(i, np.eye(3))
    np.testing.assert_array_equal(j, np.eye(3))
    bias = [layer.bias.detach().numpy() for layer in found.layers]
    assert not bias[1].any()
    hidden = np.maximum(ROWS.numpy() @ a.T + bias[0], 0)
    np.testing.assert_allclose(found(ROWS).detach(), hidden @ b.T + bias[3], atol=1e-5)


def test_a_layer_goes_where_what_it_says_is_said():
    """The shallow model is the deep one without its second layer."""
    deep = mlp(9, 9, 9)
    shallow = mlp(9, 9)
    for mine, place in zip(shallow.layers, (0, 2, 3), strict=True):
        mine.load_state_dict(deep.layers[place].state_dict())
    with torch.no_grad():
        deep.layers[1].weight.copy_(torch.eye(9) + 0.01)
        deep.layers[1].bias.zero_()
    assert matched_layers(layers_of(shallow, ROWS), layers_of(deep, ROWS)) == [0, 2, 3]


@pytest.mark.parametrize("seed", range(4))
def test_a_norm_stays_behind_its_layer(seed):
    """Whatever they say: with a layer between, what ReLU cuts off would be lost."""
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    places = matched_layers(layers_of(plain(1, 4, norm=True), x), layers_of(plain(3, 6, norm=True), x))
    assert [norm - layer for layer, norm in zip(places[:4:2], places[1:4:2], strict=True)] == [1, 1]


def test_models_of_one_depth_map_place_by_place():
    chain = layers_of(mlp(5, 5, 5), ROWS)
    assert matched_layers(chain, layers_of(mlp(4, 6, 7), ROWS)) == [0, 1, 2, 3]
    model = mlp(5)
    assert deepened(model, mlp(9), ROWS) is model
    assert as_deep([model, mlp(6)], ROWS)[0] is model


def test_the_similarity_is_that_of_the_formula():
    a, b = torch.randn(7, 3, generator=DRAWS), torch.randn(7, 2, generator=DRAWS)
    x, y = (t.double().numpy() - t.double().numpy().mean(0) for t in (a, b))
    expected = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert similarity(a, b) == pytest.approx(expected)
    assert similarity(torch.zeros(3, 2), torch.zeros(3, 2)) == 0.0


def smooth(*widths):
    return nn.Sequential(*[layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())][:-1])


class Gated(nn.Module):
    """A block without a branch that could be zero."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) * self.b(x)


def gated(depth):
    return nn.Sequential(nn.Linear(6, 4), *[Gated() for _ in range(depth)], nn.Linear(4, 3))


def test_where_nothing_without_effect_can_go_in_the_layer_is_named():
    with pytest.raises(ModelError, match=r"with the layers \['2'\] put in without effect it computes something else"):
        deepened(smooth(6, 5, 3), smooth(6, 5, 5, 3), ROWS)
    with pytest.raises(ModelError, match="layer '1', a Gated, would go into a shallower model without effect"):
        deepened(gated(0), gated(1), ROWS)


def test_models_that_are_no_shallower_forms_of_each_other_are_refused():
    with pytest.raises(ModelError, match="a model of 4 layers cannot take the form of one of 2"):
        deepened(mlp(5, 5, 5), mlp(5), ROWS)
    with pytest.raises(ModelError, match="has no place in the deeper model"):
        deepened(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)), smooth(6, 5, 5, 5, 3), ROWS)


def test_a_layer_that_is_called_twice_has_no_one_place():
    layer = nn.Linear(6, 6)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(self.layer(x))

    with pytest.raises(ModelError, match="'layer' is called twice"):
        layers_of(Twice(), ROWS)


def test_what_is_frozen_stays_so():
    deep = mlp(5, 5)
    deep.layers[0].requires_grad_(False)
    found = deepened(mlp(5), deep, ROWS)
    assert [name for name, p in found.named_parameters() if not p.requires_grad] == ["layers.0.weight", "layers.0.bias"]


def test_inputs_are_drawn_where_an_example_holds_numbers():
    assert torch.equal(shown_inputs(torch.zeros(2, 3)), shown_inputs(torch.ones(1, 3)))
    tokens = torch.tensor([[1, 2]])
    assert shown_inputs(tokens) is tokens
