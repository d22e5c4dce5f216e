"""What clients do to the model they have kept is what the server thinks they do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge.errors import ModelError
from fedmerge.matching.growing import membership
from fedmerge.models import build_model
from fedmerge.permutations import trace, transport
from fedmerge.questions.stages import News, catch_up, reordering


@pytest.mark.parametrize(
    ("name", "shape", "classes"), [("lenet", (1, 8, 8), 3), ("char_lstm", (5,), 7), ("resnet8", (3, 8, 8), 4)]
)
def test_a_reordering_carries_over_as_the_server_does(name, shape, classes):
    model = build_model(name, shape, classes, seed=0)
    dtype = torch.int64 if name == "char_lstm" else torch.float32
    spec = trace(model.eval(), torch.zeros(2, *shape, dtype=dtype))
    state = {n: t.detach() for n, t in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    free = [i for i, group in enumerate(spec.groups) if not group.inner]
    plans = {}
    for i in free:
        size = spec.groups[i].size + 2
        plans[i] = membership(torch.randperm(size, generator=generator)[: spec.groups[i].size], size)
    order = spec.identity()
    for i, perm in enumerate(spec.random(generator)):
        if i not in free:
            order[i] = perm
    told = News({}, reordering(spec, state, order, plans, ()))
    carried, caught = transport(spec, spec.apply(state, order), plans), catch_up(state, told)
    assert told.sources
    assert caught.keys() == carried.keys()
    for key in carried:
        torch.testing.assert_close(caught[key], carried[key])


def test_columns_of_grouped_convolutions_follow_their_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1))
    spec = trace(model.eval(), torch.zeros(2, 3, 4, 4))
    assert any(site.groups > 1 for group in spec.groups for site in group.sites)
    state = {n: t.detach() for n, t in model.state_dict().items()}
    order = spec.random(torch.Generator().manual_seed(1))
    caught = catch_up(state, News({}, reordering(spec, state, order, {}, ())))
    for name, tensor in spec.apply(state, order).items():
        torch.testing.assert_close(caught[name], tensor)
    assert reordering(spec, state, spec.identity(), {}, ()) == {}


def test_only_what_moves_is_told():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    spec = trace(model, torch.zeros(2, 4))
    state = model.state_dict()
    assert reordering(spec, state, spec.identity(), {0: membership(torch.arange(3), 3)}, ()) == {}
    plans = {0: membership(torch.tensor([2, 0, 3]), 4)}
    told = reordering(spec, state, spec.identity(), plans, ("0.weight", "0.bias"))
    assert list(told) == [("2.weight", 1)]
    assert told["2.weight", 1].tolist() == [1, -1, 0, 2]


@pytest.mark.parametrize(
    "news",
    [
        News({}, {("b", 0): torch.tensor([0])}),
        News({}, {("a", 0): torch.tensor([2])}),
        News({}, {("a", 1): torch.tensor([0])}),
        News({"b": torch.zeros(1)}, {}),
    ],
)
def test_news_about_another_model_are_an_error(news):
    with pytest.raises(ModelError, match="kept"):
        catch_up({"a": torch.zeros(2)}, news)
