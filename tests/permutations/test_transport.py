"""States carried to other widths by plans."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge import ModelError
from fedmerge.models.resize import resize
from fedmerge.permutations import Group, PermutationSpec, Plan, Site, trace, transport
from tests.permutations.zoo_of_models import MODELS, blocked, difference, free_perms

# Blocks have their sizes, and a shuffle of channels mixes the groups on an axis.
GROWING = [name for name, model in MODELS.items() if not model.blocks and name != "shufflenet"]


def matrices(spec, perms):
    found = [torch.eye(len(p), dtype=torch.float64)[p] for p in perms]
    return {i: Plan(m, m) for i, m in enumerate(found)}


def copies(old, new):
    """A plan that repeats neurons in turn up to `new`, the copies sharing the outgoing weights."""
    source = torch.arange(new) % old
    member = torch.eye(old, dtype=torch.float64)[source]
    return Plan(member, member / member.sum(0))


def grown(model, spec, plans):
    return resize(model, transport(spec, model.state_dict(), plans))


@pytest.mark.parametrize("name", MODELS)
def test_permutation_matrices_do_what_permutations_do(name):
    model, batch = MODELS[name].make()
    spec = trace(model, batch)
    perms = free_perms(spec, 0, blocks=False)
    plans = {i: p for i, p in matrices(spec, perms).items() if i not in blocked(spec)}
    wanted, found = spec.apply(model.state_dict(), perms), transport(spec, model.state_dict(), plans)
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, msg=key)


def test_no_plan_changes_nothing():
    model, batch = MODELS["vgg"].make()
    found = transport(trace(model, batch), model.state_dict(), {})
    assert all(torch.equal(t, found[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", GROWING)
def test_neurons_doubled_with_halved_outgoing_weights_keep_the_function(name):
    model, batch = MODELS[name].make()
    spec = trace(model, batch)
    plans = {i: copies(g.size, 2 * g.size) for i, g in enumerate(spec.groups)}
    assert difference(model, grown(model, spec, plans), batch) < 1e-5
    if name != "bilstm":  # whose layers and directions are all of one width in torch
        for i, plan in plans.items():
            assert difference(model, grown(model, spec, {i: plan}), batch) < 1e-5


def test_shuffled_channels_cannot_change_in_number():
    model, batch = MODELS["shufflenet"].make()
    spec = trace(model, batch)
    with pytest.raises(ModelError, match="cannot change: its neurons mix"):
        transport(spec, model.state_dict(), {i: copies(g.size, 2 * g.size) for i, g in enumerate(spec.groups)})


@pytest.mark.parametrize("hidden", [64, 96, 128])
@pytest.mark.parametrize("name", ["lenet", "gru", "bilstm", "mlp"])
def test_any_wider_layer_keeps_the_function(name, hidden):
    model, batch = MODELS[name].make()
    spec = trace(model, batch)
    wide = grown(model, spec, {i: copies(g.size, hidden) for i, g in enumerate(spec.groups)})
    assert difference(model, wide, batch) < 1e-5
    again = trace(wide, batch)
    assert [g.size for g in again.groups] == [hidden] * len(spec.groups)
    back = {i: Plan(torch.eye(hidden)[: g.size], _folded(g.size, hidden)) for i, g in enumerate(spec.groups)}
    assert difference(model, grown(wide, again, back), batch) < 1e-5


def _folded(old, wide):
    """Outgoing weights of copies added up."""
    return torch.eye(old, dtype=torch.float64)[torch.arange(wide) % old].T


def of_widths(*widths):
    """One function as models of these widths, neurons in any order, and a batch."""
    torch.manual_seed(0)
    small, batch = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 5)), torch.randn(32, 6)
    spec = trace(small, batch)
    models = [grown(small, spec, {0: copies(64, width)}) for width in widths]
    for model in models:
        order = [torch.randperm(model[0].out_features)]
        model.load_state_dict(trace(model, batch).apply(model.state_dict(), order))
        assert difference(small, model, batch) < 1e-5
    return models, batch


def test_pfnm_merges_64_96_and_128_neurons_to_the_function_that_all_have():
    """Whichever copy a narrow client's neuron goes to, the outgoing weights add up; at a small variance, no others."""
    models, batch = of_widths(64, 96, 128)
    merged = fedmerge.merge(models, "pfnm", example=batch, class_aware=False, gamma=1e-3, sigma=1e-3)
    assert merged[0].out_features == 128
    assert difference(models[0], merged, batch) < 1e-4


@pytest.mark.parametrize("widths", [(64, 128), (128, 64), (128, 64, 128)])
def test_otfusion_merges_64_and_128_neurons_to_the_function_that_both_have(widths):
    """Each neuron spreads over its two copies."""
    models, batch = of_widths(*widths)
    merged = fedmerge.merge(models, "otfusion", example=batch)
    assert merged[0].out_features == 128
    assert difference(models[0], merged, batch) < 1e-4


def test_otfusion_takes_widths_that_do_not_divide_each_other():
    """Mass of a neuron then goes to strangers too; the widest is the width."""
    models, batch = of_widths(64, 96, 128)
    merged = fedmerge.merge(models, "otfusion", example=batch)
    assert merged[0].out_features == 128
    assert difference(models[0], merged, batch) < 0.5


def test_what_stands_beside_a_group_on_an_axis_keeps_its_order():
    """A flatten (runs) before a part without plan, and gates (slots) around one."""
    spec = PermutationSpec((Group("a", 2, (Site("w", 1, torch.tensor([[0, 1], [2, 3]]), "in"),)),), {"w": (1, 6)})
    plan = copies(2, 3)
    found = transport(spec, {"w": torch.tensor([[1.0, 2.0, 3.0, 4.0, 8.0, 9.0]])}, {0: plan})
    assert found["w"].tolist() == [[0.5, 1.0, 3.0, 4.0, 0.5, 1.0, 8.0, 9.0]]
    gates = PermutationSpec((Group("b", 2, (Site("w", 0, torch.tensor([[1, 3], [2, 4]])),)),), {"w": (6,)})
    found = transport(gates, {"w": torch.arange(6.0)}, {0: plan})
    assert found["w"].tolist() == [0, 1, 2, 1, 3, 4, 3, 5]


def test_mixed_neurons_cannot_change_in_width_but_can_be_mixed():
    spec = PermutationSpec((Group("a", 2, (Site("w", 0, torch.tensor([[2], [0]])),)),), {"w": (3,)})
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert transport(spec, {"w": torch.tensor([1.0, 5.0, 2.0])}, {0: Plan(swap, swap)})["w"].tolist() == [2, 5, 1]
    with pytest.raises(ModelError, match="cannot change: its neurons mix"):
        transport(spec, {"w": torch.arange(3.0)}, {0: copies(2, 4)})


def test_dtypes_stay_and_the_state_too():
    model, batch = MODELS["vgg"].make()
    spec = trace(model, batch)
    state = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    before = copy.deepcopy(state)
    found = transport(spec, state, {0: copies(8, 12)})
    assert all(found[n].dtype == t.dtype for n, t in state.items())
    assert all(torch.equal(t, before[n]) for n, t in state.items())
    assert found["features.0.weight"].shape[0] == 12
