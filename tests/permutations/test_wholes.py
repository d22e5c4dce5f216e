"""Neurons that move as parts of wholes: what is free, what is not, and the proof of both."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedmerge import ModelError
from fedmerge.permutations import trace, verify
from fedmerge.permutations.grouping import groups_of
from fedmerge.permutations.labels import Labels
from tests.permutations.zoo_of_models import difference, free_perms, permuted
from tests.permutations.zoo_of_wholes import MODELS, Attention

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_groups_are_those_counted_by_hand(name):
    model, batch = MODELS[name].make()
    spec = trace(model, batch)
    assert spec.unknown == ()
    assert Counter(g.size for g in spec.groups) == Counter([*MODELS[name].sizes, *MODELS[name].blocks])
    for seed in range(2):
        perms = free_perms(spec, seed)
        assert difference(model, permuted(model, spec, perms), batch) < 1e-10
        state, then = model.state_dict(), free_perms(spec, seed + 10)
        there = spec.apply(state, perms)
        back = spec.apply(there, spec.inverse(perms))
        assert all(torch.equal(back[n], t) for n, t in state.items())
        twice, at_once = spec.apply(there, then), spec.apply(state, spec.compose(perms, then))
        assert all(torch.equal(twice[n], t) for n, t in at_once.items())


@every_model
def test_a_forgotten_site_is_caught(name):
    model, batch = MODELS[name].make()
    spec = trace(model, batch)
    largest = max(g.size * g.sites[0].positions.shape[1] for g in spec.groups)
    number = next(i for i, g in enumerate(spec.groups) if g.size * g.sites[0].positions.shape[1] == largest)
    group = spec.groups[number]
    wrong = replace(group, sites=group.sites[:-1])
    with pytest.raises(ModelError, match="Remove them from the spec"):
        verify(replace(spec, groups=(*spec.groups[:number], wrong, *spec.groups[number + 1 :])), model, batch)


@pytest.mark.parametrize(("positions", "free"), [("alibi", False), (None, True), ("window", True)])
def test_heads_with_slopes_of_their_own_stay(positions, free):
    torch.manual_seed(0)
    model, batch = Attention(positions=positions).eval(), torch.randn(4, 5, 6)
    rows = torch.cat([torch.arange(4) + 4 * head for head in (2, 0, 3, 1)])
    state = model.state_dict()
    moved = Attention(positions=positions).eval()
    exchanged = {f"{part}.{kind}": state[f"{part}.{kind}"][rows] for part in "qkv" for kind in ("weight", "bias")}
    moved.load_state_dict({**state, **exchanged, "o.weight": state["o.weight"][:, rows]})
    assert (difference(model, moved, batch) < 1e-10) == free
    assert any(g.inner for g in trace(model, batch).groups) == free


def test_dimensions_stay_where_positions_turn_them():
    model, batch = MODELS["rotary"].make()
    spec = trace(model, batch)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    turned = [1, 0, 3, 2]
    for name in ("q.weight", "q.bias", "k.weight", "k.bias"):
        state[name] = state[name].unflatten(0, (4, 4))[:, turned].flatten(0, 1)
    moved = MODELS["rotary"].make()[0]
    moved.load_state_dict(state)
    assert difference(model, moved, batch) > 1e-3
    alone = [g for g in spec.groups if not g.inner and any(s.parameter == "q.weight" and s.axis == 0 for s in g.sites)]
    assert alone == []


def test_channels_go_into_their_own_group_of_a_convolution():
    model, batch = MODELS["grouped_convolution"].make()
    spec = trace(model, batch)
    name = "blocks.0.conv2.weight"
    blocks = next(g for g in spec.groups if g.inner and any(s.parameter == name for s in g.sites))
    inputs = [spec.groups[i] for block in blocks.inner for i in block if spec.groups[i].name == "blocks.0.conv1.weight"]
    assert [g.size for g in inputs] == [4] * 4
    for number, group in enumerate(inputs):
        site = next(s for s in group.sites if s.parameter == name)
        assert (site.axis, site.role, site.groups) == (1, "in", 4)
        assert torch.equal(site.positions[:, 0], 4 * number + torch.arange(4))
    mixed = replace(inputs[0], sites=tuple(replace(s, positions=s.positions[:2]) for s in inputs[0].sites))
    other = tuple(replace(s, positions=torch.cat([s.positions, t.positions[:2]])) for s, t in
                  zip(mixed.sites, inputs[1].sites, strict=True))  # fmt: skip
    with pytest.raises(ModelError):
        verify(replace(spec, groups=(replace(mixed, size=4, sites=other),)), model, batch)


def found(labels):
    return [(g.size, [s.positions.tolist() for s in g.sites], g.inner) for g in groups_of(labels, labels.classes())]


def test_rows_and_columns_of_a_grid_that_cross():
    """Every entry lies in a row and in a column: neither entries alone, nor rows within columns may be exchanged."""
    labels = Labels()
    grid = labels.site("w", 0, 6).reshape(2, 3)
    labels.lie_within(grid, labels.site("rows", 0, 2)[:, None])
    labels.lie_within(grid, labels.site("columns", 0, 3))
    assert found(labels) == [
        (2, [[[0, 1, 2], [3, 4, 5]], [[0], [1]]], ()),
        (3, [[[0, 3], [1, 4], [2, 5]], [[0], [1], [2]]], ()),
    ]


def test_what_is_ordered_along_one_axis_is_free_along_the_other():
    labels = Labels()
    grid = labels.site("w", 0, 6).reshape(2, 3)
    labels.blocks(grid)
    labels.ordered(grid, (1,), "it meets a constant")
    assert found(labels) == [(2, [[[0, 1, 2], [3, 4, 5]]], ())]
    labels.ordered(grid, (0, 1), "it meets another")
    assert found(labels) == []


def test_a_whole_whose_member_is_pinned_is_pinned():
    labels = Labels()
    grid = labels.site("w", 0, 6).reshape(3, 2)
    labels.blocks(grid)
    labels.pin(grid[0, :1], "it is an output")
    assert [(size, sites) for size, sites, _ in found(labels)] == [
        (2, [[[2], [3]]]),
        (2, [[[4], [5]]]),
        (2, [[[2, 3], [4, 5]]]),
    ]


def test_copies_may_be_exchanged_within_what_they_copy():
    labels = Labels()
    keys = labels.site("k", 0, 2)
    labels.tie(labels.copies(keys[:, None], (2, 3)), labels.site("q", 0, 6).reshape(2, 3))
    sizes = [(size, inner) for size, _, inner in found(labels)]
    assert sizes == [(3, ()), (3, ()), (2, ((0,), (1,)))]


def test_wholes_of_the_same_members_are_one():
    labels = Labels()
    grid = labels.site("w", 0, 4).reshape(2, 2)
    labels.tie(labels.blocks(grid), labels.site("a", 0, 2))
    labels.tie(labels.blocks(grid[:, ::-1]), labels.site("b", 0, 2))
    classes = labels.classes()
    assert np.array_equal(classes.of_label[labels.sites["a", 0]], classes.of_label[labels.sites["b", 0]])


def test_constants_are_no_neurons_though_buffers_hold_them():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)
            self.register_buffer("scale", torch.arange(1.0, 7.0))

        def forward(self, x):
            return self.b(self.a(x) * self.scale)

    torch.manual_seed(0)
    assert trace(Scaled(), torch.randn(4, 5)).groups == ()
