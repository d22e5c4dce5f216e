"""Barriers, similarities and costs, against numbers worked out another way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmerge import InvalidOption, ModelError
from fedmerge.diagnostics import Barrier, barrier, matching_costs, similarity
from fedmerge.models import build_model
from fedmerge.permutations import trace


def network(seed, width=12):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def batches(seed=0, sizes=(20, 12)):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 5, generator=generator) * 2 + 1, torch.randint(0, 3, (n,), generator=generator)) for n in sizes
    ]


def test_height_is_the_rise_above_the_straight_line():
    assert Barrier((0.0, 0.5, 1.0), (1.0, 4.0, 3.0), (0.5, 0.5, 0.5)).height == pytest.approx(2.0)
    assert Barrier((0.0, 0.5, 1.0), (1.0, 0.0, 3.0), (0.5, 0.5, 0.5)).height == 0.0


def test_losses_are_those_of_interpolated_models():
    a, b, data = network(0), network(1), batches()
    b[1].running_mean += 1
    b[1].num_batches_tracked += 7
    line = barrier(a, b, data, points=5)
    assert line.positions == (0.0, 0.25, 0.5, 0.75, 1.0)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    between = network(0).eval()
    for t, loss, accuracy in zip(line.positions, line.losses, line.accuracies, strict=True):
        for own, one, other in zip(
            between.state_dict().values(), a.state_dict().values(), b.state_dict().values(), strict=True
        ):
            if own.is_floating_point():
                own.copy_((1 - t) * one + t * other)
        logits = between(x).detach()
        assert loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
        assert accuracy == pytest.approx(float((logits.argmax(1) == y).float().mean()))


def test_statistics_are_measured_afresh_at_every_point():
    a, b, data, training = network(0), network(1), batches(), batches(1, (32,))
    a[1].running_mean += 50  # wrong ones do no harm, at the ends neither
    line = barrier(a, b, data, points=3, recalibrate=training)
    other = copy.deepcopy(a)
    other[1].reset_running_stats()
    other[1].momentum = 1.0
    other.train()(training[0][0])
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    assert line.losses[0] == pytest.approx(float(F.cross_entropy(other.eval()(x).detach(), y)), rel=1e-4)
    assert line.losses[0] != pytest.approx(barrier(a, b, data, points=3).losses[0], rel=1e-2)


def test_models_stay_as_they_are_and_iterators_serve_every_point():
    a, b, data = network(0), network(1), batches()
    before = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
    line = barrier(a, b, iter(data), points=4, recalibrate=iter(data))
    assert line == barrier(a, b, data, points=4, recalibrate=data)
    for model, state in zip((a, b), before, strict=True):
        assert model.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_permuted_copies_have_a_barrier_and_matching_takes_it_away():
    a = network(0)
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(3))
    data = [(x, a.eval()(x).argmax(1))]
    spec = trace(a, x)
    perms = spec.random(torch.Generator().manual_seed(0))
    b, back = network(0), network(0)
    b.load_state_dict(spec.apply(a.state_dict(), perms))
    back.load_state_dict(spec.apply(b.state_dict(), spec.inverse(perms)))
    assert barrier(a, b, data).height > 0.01
    assert barrier(a, back, data).height < 1e-6


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"points": 1}, InvalidOption, "at least 2"),
        ({"b": network(1, width=9)}, ModelError, r"'0\.bias'"),
        ({"batches": []}, InvalidOption, "no examples"),
        ({"recalibrate": iter([])}, InvalidOption, "no examples"),
    ],
)
def test_mistakes_on_the_line(arguments, kind, words):
    with pytest.raises(kind, match=words):
        barrier(**{"a": network(0), "b": network(1), "batches": batches(), **arguments})


def by_hand(model, x):
    """Centred activations of the hidden layer."""
    hidden = model.eval()[:3](x).detach().double()
    return hidden - hidden.mean(0)


def test_cka_and_correlation_by_hand():
    models = [network(0), network(1), network(2)]
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    found = similarity(models, iter(x.split(64)), trace(models[0], x))
    assert found.groups == ("0.weight",)
    hidden = [by_hand(model, x) for model in models]
    for i, a in enumerate(hidden):
        for j, b in enumerate(hidden):
            gram = (a @ a.T, b @ b.T)
            cka = (gram[0] * gram[1]).sum() / (gram[0].norm() * gram[1].norm())
            assert float(found.cka[0, i, j]) == pytest.approx(float(cka), rel=1e-4)
            deviations = [h.norm(dim=0).clamp_min(1e-12) for h in (a, b)]
            pearson = ((a * b).sum(0) / (deviations[0] * deviations[1])).mean()
            assert float(found.correlation[0, i, j]) == pytest.approx(float(pearson), abs=1e-4)


def test_reordering_changes_correlation_but_not_cka():
    a, x = network(0).train(), torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    spec = trace(a, x)
    b = network(0)
    b.load_state_dict(spec.apply(a.state_dict(), spec.random(torch.Generator().manual_seed(0))))
    found = similarity([a, b], [x], spec)
    assert float(found.cka[0, 0, 1]) == pytest.approx(1.0)
    assert float(found.correlation[0, 0, 1]) < 0.9
    assert a.training


def test_unequal_widths_have_a_cka():
    a, b = network(0), network(1, width=20)
    x = torch.randn(50, 5)
    found = similarity([a, b], [x], [trace(a, x), trace(b, x)])
    assert 0 < float(found.cka[0, 0, 1]) < 1
    assert torch.isnan(found.correlation[0, 0, 1])
    assert torch.isfinite(found.correlation[0, 0, 0])


def test_convolutions_and_heads_are_heard():
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for name in ("lenet", "resnet8", "vit"):
        models = [build_model(name, (1, 8, 8), 10, seed=seed) for seed in (0, 1)]
        found = similarity(models, [x], trace(models[0], x))
        assert bool(((found.cka >= 0) & (found.cka <= 1 + 1e-9)).all())
        assert torch.allclose(found.cka[:, 0, 0], torch.ones(1, dtype=torch.float64), atol=1e-4)
        heads = [group for group in found.groups if "attention.value" in group]
        assert len(heads) == (4 if name == "vit" else 0)


def test_silent_groups_and_mistakes():
    a, x = network(0), torch.randn(9, 5)
    spec = trace(a, x)
    dead = copy.deepcopy(a)
    nn.init.zeros_(dead[1].weight)
    nn.init.zeros_(dead[1].bias)
    assert float(similarity([a, dead], [x], spec).cka[0, 0, 1]) == 0.0
    with pytest.raises(InvalidOption, match="1 specs for 2 models"):
        similarity([a, dead], [x], [spec])
    with pytest.raises(InvalidOption, match="pass batches"):
        similarity([a, dead], [], spec)


def test_costs_by_hand():
    a, b = network(0).state_dict(), network(1).state_dict()
    spec = trace(network(0), torch.zeros(2, 5))
    perms = [torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    names = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight")
    found = matching_costs(spec, {n: a[n] for n in (*names, "3.bias")}, b, perms)
    for other, cost in ((b, found.before[0]), (spec.apply(b, perms), found.after[0])):
        apart = sum((a[n] - other[n]).square().sum() for n in names)
        size = sum(s[n].square().sum() for n in names for s in (a, b))
        assert cost == pytest.approx(float((apart / size).sqrt()), rel=1e-5)


@pytest.mark.parametrize("name", ["lenet", "resnet8", "vit"])
def test_costs_of_a_permuted_copy_fall_to_nothing(name):
    model = build_model(name, (1, 8, 8), 10, seed=0)
    spec, state = trace(model, torch.zeros(2, 1, 8, 8)), model.state_dict()
    perms = spec.random(torch.Generator().manual_seed(0))
    found = matching_costs(spec, state, spec.apply(state, perms), spec.inverse(perms))
    assert len(found.groups) == len(found.before) == len(found.after)
    assert max(found.after) == 0.0
    assert min(found.before) > 0.1
