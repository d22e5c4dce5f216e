"""Permutations form a group that acts on states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedmerge import InvalidOption
from fedmerge.permutations import Group, PermutationSpec, Site, trace
from tests.permutations.zoo_of_models import MODELS, free_perms

every_model = pytest.mark.parametrize("name", MODELS)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def equal(one, other):
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@every_model
def test_laws_of_a_group(name):
    model, batch = MODELS[name].make()
    spec, state = trace(model, batch), model.state_dict()
    identity = spec.identity()
    assert same(spec.apply(state, identity), state)
    for seed in range(3):
        p, q, r = (free_perms(spec, 3 * seed + i) for i in range(3))
        moved = spec.apply(state, p)
        assert not same(moved, state)
        assert same(spec.apply(moved, spec.inverse(p)), state)
        assert same(spec.apply(spec.apply(state, spec.inverse(p)), p), state)
        assert same(spec.apply(moved, q), spec.apply(state, spec.compose(p, q)))
        assert equal(spec.compose(spec.compose(p, q), r), spec.compose(p, spec.compose(q, r)))
        for product in (spec.compose(p, spec.inverse(p)), spec.compose(spec.inverse(p), p)):
            assert equal(product, identity)
        assert equal(spec.inverse(spec.inverse(p)), p)
        assert equal(spec.compose(p, identity), p)
        assert equal(spec.compose(identity, p), p)


@every_model
def test_applying_only_moves_entries(name):
    model, batch = MODELS[name].make()
    spec, state = trace(model, batch), model.state_dict()
    before = {n: t.clone() for n, t in state.items()}
    moved = spec.apply(state, free_perms(spec, 0))
    assert same(state, before)
    for name_, tensor in moved.items():
        assert tensor.dtype == state[name_].dtype
        assert torch.equal(tensor.ravel().sort().values, state[name_].ravel().sort().values)


def test_a_permutation_puts_neuron_p_i_in_place_i():
    model, batch = MODELS["mlp"].make()
    spec, state = trace(model, batch), model.state_dict()
    perms = free_perms(spec, 0)
    moved = spec.apply(state, perms)
    assert torch.equal(moved["0.weight"], state["0.weight"][perms[0]])
    assert torch.equal(moved["2.weight"], state["2.weight"][perms[1]][:, perms[0]])
    assert torch.equal(moved["4.weight"], state["4.weight"][:, perms[1]])
    assert moved["4.bias"] is state["4.bias"]


def blocks():
    """Two blocks of three rows each."""
    rows = torch.arange(6).reshape(2, 3)
    inner = [Group("a", 3, (Site("a", 0, row[:, None]),)) for row in rows]
    return PermutationSpec((*inner, Group("a", 2, (Site("a", 0, rows),), ((0,), (1,)))), {"a": (6,)})


def test_what_is_within_a_block_moves_first():
    perms = [torch.tensor([1, 2, 0]), torch.tensor([2, 1, 0]), torch.tensor([1, 0])]
    state = {"a": torch.arange(6)}
    assert blocks().apply(state, perms)["a"].tolist() == [5, 4, 3, 1, 2, 0]
    assert same(blocks().apply(blocks().apply(state, perms), blocks().inverse(perms)), state)


def test_a_hand_written_spec_needs_no_shapes():
    spec = replace(blocks(), shapes={})
    assert spec.apply({"a": torch.arange(6)}, spec.identity())["a"].tolist() == list(range(6))


def test_an_alias_follows_its_tensor():
    spec = replace(blocks(), aliases={"b": "a"})
    perms = spec.random(torch.Generator().manual_seed(1))
    moved = spec.apply({"a": torch.arange(6), "b": torch.arange(6)}, perms)
    assert torch.equal(moved["a"], moved["b"])
    assert "b" not in spec.apply({"a": torch.arange(6)}, perms)


def test_random_permutations_come_from_their_generator():
    spec = trace(*MODELS["mlp"].make())
    assert equal(free_perms(spec, 5), free_perms(spec, 5))
    assert not equal(free_perms(spec, 5), free_perms(spec, 6))


def test_permutations_that_do_not_fit():
    spec, state = blocks(), {"a": torch.arange(6)}
    with pytest.raises(InvalidOption, match="2 permutations for 3 groups"):
        spec.apply(state, spec.identity()[:2])
    with pytest.raises(InvalidOption, match="group 'a' has 3 neurons, its permutation 2"):
        spec.apply(state, [torch.arange(2), torch.arange(3), torch.arange(2)])
    with pytest.raises(InvalidOption, match="trace the model"):
        spec.apply({"b": torch.arange(6)}, spec.identity())


def test_a_description_tells_all():
    text = blocks().describe()
    assert "group 2 'a': 2 neurons, blocks of groups [0], ..." in text
    assert "a axis 0, 3 positions each" in text
    full = trace(*MODELS["language_model"].make()).describe()
    assert "pinned embed.weight axis 0: a vocabulary has its order" in full
