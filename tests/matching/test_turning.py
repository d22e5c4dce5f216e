"""Models turned towards each other: planted rotations are found, others come nearer, refusals are told."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import ModelError
from fedmerge.matching.turning import turn_towards
from fedmerge.matching.weight_costs import match_weights
from fedmerge.models.vit import ViT
from fedmerge.permutations.rotations import random_rotation
from tests.permutations.test_rotations import TOKENS, Decoder, found_in, varied


def turned_copy(model, seed):
    """The same function in another basis, units and heads in another order."""
    rng, found, other = torch.Generator().manual_seed(seed), found_in(model), copy.deepcopy(model)
    state = found.prepared({name: tensor.double() for name, tensor in model.state_dict().items()})
    state = found.spec.apply(state, found.spec.random(rng))
    matrices = {i: random_rotation(found.spec.groups[i].size, kind, rng) for i, kind in found.kinds.items()}
    other.load_state_dict({name: t.float() for name, t in found.turned(state, matrices).items()})
    return other


def apart(one, other):
    with torch.no_grad():
        wanted = one(TOKENS)
        return float((other(TOKENS) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_turned_copies_merge_to_the_function_of_each(norm):
    torch.manual_seed(2)
    model = varied(Decoder(norm))
    copies = [model, turned_copy(model, 1), turned_copy(model, 2)]
    assert all(apart(model, one) < 1e-5 for one in copies), "a copy computes what the model does"
    assert apart(model, fedmerge.merge(copies, "glmc", example=TOKENS)) < 1e-5
    assert apart(model, fedmerge.merge(copies[:2], "rebasin", example=TOKENS)) > 1e-2


def test_the_zoos_vit_can_be_turned():
    torch.manual_seed(0)
    model = varied(ViT((1, 4, 4), 3, dim=8, depth=1, heads=2, patch=1))
    x = torch.randn(3, 1, 4, 4)
    merged = fedmerge.merge([model, copy.deepcopy(model)], "glmc", example=x)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.norm.weight, torch.ones(8))  # folded


def test_turning_brings_models_nearer_than_permuting_does():
    torch.manual_seed(3)
    a, b = varied(Decoder(), 1), varied(Decoder(), 2)
    found = found_in(a)
    ours, theirs = (found.prepared({n: t.double() for n, t in m.state_dict().items()}) for m in (a, b))
    turned = turn_towards(found, ours, theirs)

    def distance(one):
        return sum(float((ours[n] - one[n]).square().sum()) for n in ours) ** 0.5

    best = found.spec.apply(theirs, match_weights(found.spec, ours, theirs)[0])
    assert distance(turned) < 0.95 * distance(best) < distance(theirs)
    with torch.no_grad():
        outputs = torch.func.functional_call(b.double(), turned, (TOKENS,))
        torch.testing.assert_close(outputs, b(TOKENS), rtol=0, atol=1e-10)


def test_inputs_are_untouched_and_results_repeat():
    torch.manual_seed(4)
    models = [varied(Decoder(), 1), varied(Decoder(), 2)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    one, two = (fedmerge.merge(models, "glmc", example=TOKENS).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(t, b[n]) for m, b in zip(models, before, strict=True) for n, t in m.state_dict().items())


def test_a_post_norm_model_is_refused_by_name_and_permuted_on_request():
    torch.manual_seed(5)
    models = [varied(Decoder(post=True), 1), varied(Decoder(post=True), 2)]
    with pytest.raises(ModelError, match=r"'norm1.weight' cannot be folded \(what it gives goes into add\).*rebasin"):
        fedmerge.merge(models, "glmc", example=TOKENS)
    same = [models[0], copy.deepcopy(models[0])]
    assert apart(models[0], fedmerge.merge(same, "glmc(strict=false)", example=TOKENS)) < 1e-5


def test_a_net_of_relus_has_nothing_to_turn_and_is_permuted():
    torch.manual_seed(6)
    nets = [nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2)]
    merged = fedmerge.merge(nets, "glmc", example=torch.zeros(2, 3))
    wanted = fedmerge.merge(nets, "rebasin", example=torch.zeros(2, 3))
    torch.testing.assert_close(merged(torch.ones(1, 3)), wanted(torch.ones(1, 3)))
