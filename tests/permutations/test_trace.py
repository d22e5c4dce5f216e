"""Which neurons of real architectures may be re-ordered, and the proof that they may."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedmerge import ModelError
from fedmerge.permutations import Group, PermutationSpec, Site, trace, verify
from tests.permutations.zoo_of_models import MODELS, difference, free_perms, permuted

every_model = pytest.mark.parametrize("name", MODELS)


def without(spec, group, site):
    """The spec with one site of one group forgotten."""
    sites = spec.groups[group].sites
    wrong = replace(spec.groups[group], sites=sites[:site] + sites[site + 1 :])
    return replace(spec, groups=(*spec.groups[:group], wrong, *spec.groups[group + 1 :]))


@every_model
def test_groups_are_those_counted_by_hand(name):
    model, batch = MODELS[name].make()
    spec = trace(model, batch)
    found, wanted = (Counter(sizes) for sizes in ([g.size for g in spec.groups], MODELS[name].sizes))
    assert found == wanted
    assert sum(bool(group.inner) for group in spec.groups) == MODELS[name].blocks
    assert spec.unknown == ()
    assert verify(spec, model, batch) < 1e-5
    named = model.state_dict()
    for group in spec.groups:
        assert group.name == next((s for s in group.sites if s.role == "out"), group.sites[0]).parameter
        for site in group.sites:
            assert len(site.positions) == group.size
            assert site.positions.max() < named[site.parameter].shape[site.axis]
            assert site.positions.unique().numel() == site.positions.numel()


@every_model
def test_any_permutation_keeps_the_function(name):
    model, batch = MODELS[name].make()
    spec = trace(model, batch)
    for seed in range(3):
        perms = free_perms(spec, seed)
        moved = permuted(model, spec, perms)
        assert difference(model, moved, batch) < 1e-10
        changed = [n for n, t in model.state_dict().items() if not torch.equal(t, moved.state_dict()[n])]
        assert len(changed) >= len(perms) / 2


@every_model
def test_tracing_leaves_the_model_as_it_was(name):
    model, batch = MODELS[name].make()
    model.train()
    frozen = next(model.children(), model)
    frozen.eval()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    generator, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    text = repr(model)
    trace(model, batch)
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == wants
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert repr(model) == text


@every_model
def test_a_forgotten_site_is_caught(name):
    model, batch = MODELS[name].make()
    spec = trace(model, batch)
    largest = max(g.size for g in spec.groups)
    candidates = [(i, k) for i, g in enumerate(spec.groups) if g.size == largest for k in range(len(g.sites))]
    (i, k), *others = candidates[:: max(1, len(candidates) // 3)][:3]
    with pytest.raises(ModelError, match="Remove them from the spec") as caught:
        verify(without(spec, i, k), model, batch)
    assert repr(spec.groups[i].name) in str(caught.value)
    # What it would raise is not needed again, and to name the groups takes long.
    assert all(verify(without(spec, *other), model, batch, tolerance=float("inf")) > 1e-5 for other in others)


@pytest.mark.parametrize("name", ["resnet18_group_norm", "encoder", "swin", "language_model"])
def test_a_forgotten_site_of_small_groups_is_caught(name):
    """Of two heads, or of two channels in a group of a norm."""
    model, batch = MODELS[name].make()
    spec = trace(model, batch)
    small = [i for i, g in enumerate(spec.groups) if g.size <= 4]
    missed = []
    for i in small[:: max(1, len(small) // 8)]:
        wrong = without(spec, i, 0)
        for seed in range(3):
            # What it would raise is not needed, and to name the groups takes long.
            if verify(wrong, model, batch, tolerance=float("inf"), seed=seed) < 1e-5:
                missed.append((i, spec.groups[i].size, seed))
    assert missed == []


@pytest.mark.parametrize("name", ["mlp", "lenet", "vgg", "resnet20", "gru"])
def test_two_groups_taken_for_one_are_caught(name):
    model, batch = MODELS[name].make()
    spec = trace(model, batch)
    if len(spec.groups) == 1:  # units of a recurrent layer taken for others in one gate
        site = spec.groups[0].sites[0]
        gates = replace(site, positions=torch.stack([site.positions[:, 0].flip(0), *site.positions.T[1:]], 1))
        wrong = replace(spec, groups=(replace(spec.groups[0], sites=(gates, *spec.groups[0].sites[1:])),))
        mixed = spec.groups[0].name
    else:
        one, other = spec.groups[:2]
        size = min(one.size, other.size)
        sites = tuple(replace(s, positions=s.positions[:size]) for s in (*one.sites, *other.sites))
        # The first group's place on one tensor and the second's on another are called the same neurons.
        merged = Group(one.name, size, sites[:1] + sites[len(one.sites) + 1 :])
        wrong = replace(spec, groups=(merged, *spec.groups[2:]))
        mixed = one.name
    with pytest.raises(ModelError, match="re-ordering neurons changes the outputs") as caught:
        verify(wrong, model, batch)
    assert repr(mixed) in str(caught.value)
    assert all(repr(g.name) not in str(caught.value) for g in spec.groups[2:])


def test_one_permutation_for_two_independent_groups_is_a_symmetry_too():
    model, batch = MODELS["mlp"].make()
    spec = trace(model, batch)
    one, other = spec.groups
    sites = tuple(replace(s, positions=s.positions[:12]) for s in (*one.sites, *other.sites))
    assert verify(replace(spec, groups=(Group(one.name, 12, sites),)), model, batch) < 1e-5


@pytest.mark.parametrize("name", ["mobilenet_v3", "convnext"])
def test_a_forgotten_site_is_caught_in_a_model_at_its_start(name):
    """Where outputs are little more than the last bias, a mistake is small next to them."""
    torch.manual_seed(0)
    model, batch = MODELS[name].build().eval(), torch.randn(4, 3, 32, 32)
    spec = trace(model, batch)
    group = spec.groups[0]
    missed = []
    for k, site in enumerate(group.sites):
        if verify(without(spec, 0, k), model, batch, tolerance=float("inf")) < 1e-5:
            missed.append((site.parameter, site.axis))
    assert missed == []


class Strange(nn.Module):
    """Sorts its neurons, for which there is no rule, between two hidden layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 9), nn.Linear(9, 7), nn.Linear(7, 3)

    def forward(self, x):
        hidden = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(torch.cumprod(hidden.sort(1).values, 1))))


def test_an_unknown_operator_pins_what_it_touches():
    torch.manual_seed(0)
    model, batch = Strange(), torch.randn(4, 5)
    spec = trace(model, batch)
    assert spec.unknown == ("sort",)
    assert [(g.name, g.size) for g in spec.groups] == [("b.weight", 7)]
    assert spec.pinned["a.weight", 0] == "there is no rule for sort"
    assert "no rule for sort" in spec.describe()
    assert ("b.weight", 0) not in spec.pinned


@torch.library.custom_op("fedmerge_tests::shift", mutates_args=())
def shift(x: torch.Tensor) -> torch.Tensor:
    return x.roll(1, -1) * torch.arange(1.0, x.shape[-1] + 1, dtype=x.dtype)


@shift.register_fake
def _(x):
    return torch.empty_like(x)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 9), nn.Linear(9, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(shift(self.a(x)))))


def test_an_operator_of_another_library_pins_too():
    torch.manual_seed(0)
    spec = trace(Custom(), torch.randn(4, 5))
    assert spec.unknown == ("shift",)
    assert [(g.name, g.size) for g in spec.groups] == [("b.weight", 7)]
    assert "shift" in spec.pinned["a.weight", 0]


class Ordered(nn.Module):
    """Neurons that stand in an order: `kind` says why."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = torch.relu(self.a(x))
        if self.kind == "input":
            hidden = hidden + x
        elif self.kind == "position":
            hidden = hidden * torch.arange(6.0, dtype=x.dtype)
        elif self.kind == "cumulative":
            hidden = hidden.cumsum(1)
        elif self.kind == "picked":
            hidden = torch.cat([hidden[:, [0]], hidden[:, 1:]], 1)
        elif self.kind == "rolled":
            hidden = hidden + hidden.roll(1, 1)
        elif self.kind == "output":
            return hidden
        return self.b(hidden)


@pytest.mark.parametrize("kind", ["input", "position", "cumulative", "rolled", "output"])
def test_neurons_in_an_order_stay(kind):
    torch.manual_seed(0)
    model, batch = Ordered(kind), torch.randn(4, 6)
    assert trace(model, batch).groups == ()


def test_the_neurons_beside_one_that_is_picked_are_free():
    torch.manual_seed(0)
    model, batch = Ordered("picked"), torch.randn(4, 6)
    spec = trace(model, batch)
    assert all(g.size <= 6 for g in spec.groups)
    assert verify(spec, model, batch) < 1e-5


class Residual(nn.Module):
    """A sum ties two layers; the part of a concatenation that skips it is free."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(5, 4), nn.Linear(10, 3)

    def forward(self, x):
        a = torch.relu(self.a(x))
        return self.d(torch.cat([a + self.b(a), self.c(x)], 1))


def test_sums_tie_and_concatenations_do_not():
    torch.manual_seed(0)
    spec = trace(Residual(), torch.randn(4, 5))
    found = {g.name: {(s.parameter, s.axis, s.role, tuple(s.positions.ravel().tolist())) for s in g.sites}
             for g in spec.groups}  # fmt: skip
    six, four = tuple(range(6)), tuple(range(4))
    assert found == {
        "a.weight": {
            ("a.weight", 0, "out", six), ("a.bias", 0, "out", six), ("b.weight", 1, "in", six),
            ("b.weight", 0, "out", six), ("b.bias", 0, "out", six), ("d.weight", 1, "in", six),
        },
        "c.weight": {("c.weight", 0, "out", four), ("c.bias", 0, "out", four), ("d.weight", 1, "in", (6, 7, 8, 9))},
    }  # fmt: skip


def test_a_flatten_gives_each_channel_its_pixels():
    model, batch = MODELS["lenet"].make()
    spec = trace(model, batch)
    (site,) = [s for g in spec.groups for s in g.sites if (s.parameter, s.axis) == ("fc1.weight", 1)]
    assert torch.equal(site.positions, torch.arange(250).reshape(10, 25))
    assert site.role == "in"


def test_gates_of_a_recurrent_unit_move_together():
    model, batch = MODELS["gru"].make()
    (group,) = trace(model, batch).groups
    found = {(s.parameter, s.axis): s for s in group.sites}
    assert torch.equal(found["rnn.weight_hh_l0", 0].positions, torch.arange(30).reshape(3, 10).T)
    assert torch.equal(found["rnn.weight_hh_l0", 1].positions, torch.arange(10)[:, None])
    assert {key for key, site in found.items() if site.role == "in"} == {("rnn.weight_hh_l0", 1), ("out.weight", 1)}


def test_a_start_that_is_handed_over_pins_recurrent_units():
    class Started(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x, start):
            return self.out(self.rnn(x, start)[0])

    torch.manual_seed(0)
    assert trace(Started(), (torch.randn(2, 7, 6), torch.randn(1, 2, 8))).groups == ()


def test_tied_weights_are_one_tensor():
    model, batch = MODELS["language_model"].make()
    spec = trace(model, batch)
    assert spec.aliases == {"out.weight": "embed.weight"}
    assert spec.pinned["embed.weight", 0] == "a vocabulary has its order"
    moved = spec.apply(model.state_dict(), free_perms(spec, 0))
    assert torch.equal(moved["out.weight"], moved["embed.weight"])
    assert all(s.parameter != "out.weight" for g in spec.groups for s in g.sites)


def test_heads_hold_their_queries_keys_and_values():
    model, batch = MODELS["encoder"].make()
    spec = trace(model, batch)
    for heads in (g for g in spec.groups if g.inner):
        assert heads.size == 2
        inner = [spec.groups[i] for whole in heads.inner for i in whole]
        assert [g.size for g in inner] == [8] * 4
        rows = torch.cat([s.positions.ravel() for g in inner for s in g.sites if s.parameter.endswith("proj_weight")])
        assert torch.equal(rows.sort().values, torch.arange(48))


def test_another_batch_size_and_training_mode_have_the_same_groups():
    model, batch = MODELS["resnet20"].make()
    one = trace(model, batch)
    model.train()
    other = trace(model, batch[:3])
    assert [(g.name, g.size) for g in one.groups] == [(g.name, g.size) for g in other.groups]


def test_what_is_kept_does_not_serve_another_architecture():
    """Two models alike in names and shapes, unlike in what they do."""

    class Alike(nn.Module):
        def __init__(self, skip):
            super().__init__()
            self.a, self.b, self.skip = nn.Linear(6, 6), nn.Linear(6, 3), skip

        def forward(self, x):
            return self.b(torch.relu(self.a(x)) + x if self.skip else torch.relu(self.a(x)))

    torch.manual_seed(0)
    batch = torch.randn(2, 6)
    assert len(trace(Alike(False), batch).groups) == 1
    assert len(trace(Alike(True), batch).groups) == 0
    assert len(trace(Alike(False), batch).groups) == 1


def test_what_is_kept_does_not_serve_a_closure():
    def alike(skip):
        class Alike(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

            def forward(self, x):
                return self.b(torch.relu(self.a(x)) + x if skip else torch.relu(self.a(x)))

        return Alike()

    torch.manual_seed(0)
    batch = torch.randn(2, 6)
    assert len(trace(alike(False), batch).groups) == 1
    assert len(trace(alike(True), batch).groups) == 0


def test_a_model_that_cannot_be_exported_is_an_error_that_says_so():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(ModelError, match="Branching cannot be exported"):
        trace(Branching(), torch.zeros(2, 4))


def test_a_hand_written_spec_is_proved_and_refuted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    neurons = torch.arange(8)[:, None]
    sites = (Site("0.weight", 0, neurons), Site("0.bias", 0, neurons), Site("2.weight", 1, neurons, "in"))
    batch = torch.randn(5, 4)
    assert verify(PermutationSpec((Group("hidden", 8, sites),)), model, batch) < 1e-5
    with pytest.raises(ModelError, match=r"wrong are 'hidden' \(0.weight axis 0, 2.weight axis 1\)"):
        verify(PermutationSpec((Group("hidden", 8, (sites[0], sites[2])),)), model, batch)


def test_verify_leaves_the_model_as_it_was():
    model, batch = MODELS["resnet18"].make()
    spec = trace(model, batch)
    model.train()
    before = copy.deepcopy(model.state_dict())
    verify(spec, model, batch)
    assert model.training
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in model.state_dict().items())
