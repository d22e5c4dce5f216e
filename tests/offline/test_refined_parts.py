"""Refinements where heads are left out and differ: each client answers with its own, and nobody's head moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption


class Net(nn.Module):
    """A body with a norm, and a head of any kind."""

    def __init__(self, head, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU())
        if isinstance(head, int):
            self.head = nn.Linear(6, head)
        else:
            self.outputs = head()

    def forward(self, x):
        return (self.head if hasattr(self, "head") else self.outputs)(self.body(x))


def deep():
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def loader(classes, seed):
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(seed))
    return [(x + seed, torch.arange(60) % classes)]


MODELS = {
    "sizes": lambda: ([Net(2, 1), Net(4, 2)], ["head"], [2, 4]),
    "kinds": lambda: ([Net(2, 1), Net(deep, 2)], ["head", "outputs"], [2, 3]),
    "first is deeper": lambda: ([Net(deep, 18), Net(2, 8)], ["head", "outputs"], [3, 2]),
}


@pytest.mark.parametrize("which", MODELS)
def test_norms_are_those_of_all_clients_whatever_their_heads(which):
    models, left, classes = MODELS[which]()
    clients = [loader(k, i) for i, k in enumerate(classes)]
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    merged = fedmerge.merge(models, "fedavg+recalibrate", clients=clients, leave_out=left)
    plain = fedmerge.merge(models, "fedavg", leave_out=left)
    with torch.no_grad():  # every tenth example judges
        inputs = plain.body[2](
            plain.body[1](plain.body[0](torch.cat([x[torch.arange(60) % 10 > 0] for ((x, _),) in clients])))
        )
    torch.testing.assert_close(merged.body[3].running_mean, inputs.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(merged.body[3].running_var, inputs.var(0, correction=0), atol=1e-4, rtol=1e-3)
    for name, tensor in merged.state_dict().items():
        if not name.startswith("body.3.running"):
            assert torch.equal(tensor, plain.state_dict()[name]), name
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("refinement", ["sequential_refit", "sequential_refit(head=True)", "prefix_regmean"])
@pytest.mark.parametrize("which", MODELS)
def test_no_head_is_refitted(which, refinement):
    models, left, classes = MODELS[which]()
    clients = [loader(k, i) for i, k in enumerate(classes)]
    merged = fedmerge.merge(models, f"fedavg+{refinement}", clients=clients, leave_out=left)
    plain = fedmerge.merge(models, "fedavg", leave_out=left).state_dict()
    moved = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert moved <= {f"body.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}


def test_each_client_judges_with_its_own_head():
    """The clients' loss is as low as their own heads make it: the gradient step is taken, and heads stay."""
    models, left, classes = MODELS["sizes"]()
    clients = [loader(k, i) for i, k in enumerate(classes)]
    plain = fedmerge.merge(models, "fedavg", leave_out=left)
    merged = fedmerge.merge(models, "fedavg+natural_gradient", clients=clients, leave_out=left)
    assert torch.equal(merged.head.weight, models[0].head.weight)

    def loss(body):
        total = 0.0
        for model, batches in zip(models, clients, strict=True):
            whole = fedmerge.with_part(body, model, ["head"]).eval()
            total += sum(nn.functional.cross_entropy(whole(x), y).item() for x, y in batches)
        return total

    assert loss(merged) < loss(plain) - 0.01


@pytest.mark.parametrize(
    "refinement", ["ridge_head", "logistic_head", "analytic_head", "gaussian_head", "surgery", "recalibrate+ridge_head"]
)
@pytest.mark.parametrize("apart", [True, False])
def test_what_fits_the_head_says_that_it_is_left_out(refinement, apart):
    models = [Net(2, 1), Net(3 if apart else 2, 2)]
    clients = [loader(2, 0), loader(2, 1)]
    with pytest.raises(InvalidOption, match=r"fits the head, and 'head\.weight' is left out"):
        fedmerge.merge(models, f"fedavg+{refinement}", clients=clients, leave_out=["head"])
    shared = [Net(2, 1), Net(2, 2)]
    merged = fedmerge.merge(shared, f"fedavg+{refinement}", clients=clients, leave_out=["body.0"])
    assert torch.equal(merged.body[0].weight, shared[0].body[0].weight)


def test_what_trains_the_merged_model_further_is_refused():
    with pytest.raises(InvalidOption, match="only one of them could"):
        fedmerge.merge([Net(2, 1), Net(3, 2)], "fedma", clients=[loader(2, 0), loader(3, 1)], leave_out=["head"])
