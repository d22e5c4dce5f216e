"""What methods add to gradients: by hand, by autograd and stacked alike, for every optimiser that stacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge.training import Correction, LocalTraining, Participant, cohort, train, train_cohort, train_one_by_one
from tests.training.test_cohort import OPTIMISERS

SIZES = (9, 14, 3)


def model():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def people():
    """The second client adds nothing to one layer, the third nothing at all."""
    rng = torch.Generator().manual_seed(1)
    found = []
    for client, n in enumerate(SIZES):
        offset = {name: 0.3 * torch.randn(p.shape, generator=rng) for name, p in model().named_parameters()}
        offset = {name: t for name, t in offset.items() if client == 0 or (client == 1 and name != "0.weight")}
        x, y = torch.randn(n, 3, generator=rng), torch.randint(2, (n,), generator=rng)
        found.append(Participant(client, x, y, offset))
    return found


@pytest.fixture(params=["by hand", "vmap"])
def engine(request, monkeypatch):
    if request.param == "vmap":
        monkeypatch.setattr(cohort, "linear_layers", lambda *_: None)


@pytest.mark.parametrize("schedule", ["constant", "warmup(length=3)+cosine"])
@pytest.mark.parametrize("kind", [*OPTIMISERS, "adamw"])
def test_stacked_clients_end_where_each_would_alone(engine, kind, schedule):
    options = OPTIMISERS.get(kind, {"optimizer": "adamw"})
    settings = LocalTraining(**{"learning_rate": 0.1, **options}, epochs=2, batch_size=4, step_schedule=schedule)
    named = {"seed": 0, "round": 1}
    stacked = train_cohort(model(), people(), settings, **named, pull=0.4)
    serial = train_one_by_one(model(), people(), settings, **named, pull=0.4)
    alone = [Participant(one.client, one.x, one.y) for one in people()]
    bare = train_one_by_one(model(), alone, settings, **named)
    for name, tensor in serial.states.items():
        torch.testing.assert_close(stacked.states[name], tensor, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(bare.states[name][0], tensor[0], atol=1e-3), "the correction does nothing"
    assert [report.steps for report in stacked.reports] == [report.steps for report in serial.reports]


def test_a_step_along_the_corrected_gradient_is_what_the_formula_says():
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    net, settings = model(), LocalTraining(learning_rate=0.5, momentum=0.0, steps=2, batch_size=6)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    offset = {name: torch.full_like(p, 0.2) for name, p in start.items()}
    train(net, x, y, settings, seed=0, client=0, round=1, correction=Correction(0.7, offset))
    want = {name: p.clone().requires_grad_() for name, p in start.items()}
    for _ in range(2):
        loss = nn.functional.cross_entropy(torch.func.functional_call(model(), want, (x,)), y)
        gradients = torch.autograd.grad(loss, list(want.values()))
        want = {
            name: (p - 0.5 * (g + 0.7 * (p - start[name]) + 0.2)).detach().requires_grad_()
            for (name, p), g in zip(want.items(), gradients, strict=True)
        }
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, want[name])


def test_what_is_frozen_stays_whatever_a_method_adds(engine):
    net = model()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.detach().clone()
    named = {"seed": 0, "round": 1}
    for done in (train_cohort, train_one_by_one):
        states = done(net, people(), LocalTraining(epochs=1, batch_size=4), **named, pull=0.4).states
        assert all(torch.equal(one, before) for one in states["0.weight"])
