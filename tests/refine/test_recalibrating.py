"""Batch norms measured anew by clients: what is measured, when, and that fedkfac gains by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedmerge
from fedmerge.errors import InvalidOption
from fedmerge.merging import build_pipeline
from fedmerge.questions import Question, pooled, respond
from fedmerge.refine import Recalibrate
from fedmerge.statistics import BatchNormSums


def _net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 12), nn.BatchNorm1d(12),
        nn.ReLU(), nn.Linear(12, 3),
    )  # fmt: skip


def _data(n: int, seed: int, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    patterns = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    return patterns[y] + 0.5 * torch.randn(n, 1, 8, 8, generator=g) + shift, y


def _asks(asked):
    """Wrap fedmerge's answers so that what is asked of clients is noted."""
    return lambda question, *rest: asked.append([kind.name for kind in question.needs]) or respond(question, *rest)


def _measured(model, clients) -> dict[str, torch.Tensor]:
    """The statistics that the step proposes to the guard."""
    (step,), state = Recalibrate().steps(model.state_dict()), model.state_dict()
    question = Question(state, needs=step.needs())
    found = pooled([question], [(i, [respond(question, model, batches)]) for i, batches in enumerate(clients)])
    proposal, _ = step.propose(state, found[0].statistics, {})
    return proposal.around(state).point(proposal.preferred)


def _kept(x: torch.Tensor) -> torch.Tensor:
    return x[torch.arange(len(x)) % 10 != 0]  # every tenth example judges


def test_statistics_are_those_of_all_data_at_once():
    """Clients of unequal number and of different mean: what lies between them counts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).double()
    clients = [(x.double() + 30, y) for x, y in (_data(50, 1), _data(200, 2, shift=3.0), _data(81, 3, shift=-1.0))]
    found = _measured(model, [list(zip(x.split(32), y.split(32), strict=True)) for x, y in clients])
    z = model[0](torch.cat([_kept(x) for x, _ in clients])).detach()
    torch.testing.assert_close(found["1.running_mean"], z.mean((0, 2, 3)))
    torch.testing.assert_close(found["1.running_var"], z.var((0, 2, 3), correction=0))


def test_deeper_norms_are_near_those_of_one_pass_over_all_data():
    model, at_once = _net(0), _net(0)
    x, y = _data(2000, 1)
    found = _measured(model, [[(x[:1500], y[:1500])], [(x[1500:], y[1500:])]])
    for norm in (at_once[1], at_once[5]):
        norm.momentum = 1.0
    at_once.train()(torch.cat([_kept(x[:1500]), _kept(x[1500:])]))
    torch.testing.assert_close(found["5.running_mean"], at_once[5].running_mean, atol=0.01, rtol=0.02)
    torch.testing.assert_close(found["5.running_var"], at_once[5].running_var, atol=0.01, rtol=0.05)


def test_nothing_is_asked_of_clients_whose_model_has_no_batch_norm(monkeypatch):
    asked = []
    monkeypatch.setattr("fedmerge.offline.merge.respond", _asks(asked))
    net, batch = nn.Linear(4, 2), (torch.randn(20, 4), torch.randint(2, (20,)))
    merged = fedmerge.merge([net, net], "fedavg+recalibrate", clients=[[batch], [batch]])
    assert not asked
    assert torch.equal(merged.weight, net.weight)
    fedmerge.merge([_net(0)] * 2, "fedavg+recalibrate", clients=[[_data(40, 0)], [_data(40, 1)]])
    assert asked == [["batch_norm_sums"]] * 2 + [[]] * 2


@pytest.mark.parametrize(("method", "warned"), [("rebasin", True), ("rebasin+recalibrate", False), ("fedkfac", False)])
def test_nobody_is_told_to_measure_norms_that_clients_will_measure(method, warned, caplog):
    x, y = _data(40, 0)
    fedmerge.merge([_net(0), _net(1)], method, clients=[[(x, y)], [_data(40, 1)]], example=x[:2])
    assert ("statistics of batch norm are averages" in caplog.text) == warned


def test_worse_statistics_are_declined():
    """A model that fits its data with its own statistics keeps them."""
    x = torch.tensor([[0.0], [3.0], [4.0], [9.0]]).repeat(20, 1)
    y = (x[:, 0] > 3.5).long()
    model = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():  # decides where the running mean is: at 3.5, where the classes part, and not at the data's 4
        model[0].running_mean.fill_(3.5)
        model[1].weight.copy_(torch.tensor([[-9.0], [9.0]]))
    merged = fedmerge.merge([model, model], "fedavg+recalibrate", clients=[[(x, y)], [(x, y)]])
    assert merged[0].running_mean.item() == 3.5


@pytest.mark.parametrize(
    ("mend", "what"),
    [
        (lambda value: value.pop("1.running_mean.second"), "first and a second"),
        (lambda value: value.update({"1.running_mean.second": torch.zeros(6)}), "negative variance"),
        (lambda value: value.update({"1.running_mean.first": torch.ones(5)}), "of no batch norm"),
    ],
)
def test_moments_that_cannot_be_are_refused(mend, what):
    model = _net(0)
    value = dict(BatchNormSums().measure(model, [(_data(20, 0, shift=2.0)[0], torch.zeros(20))], None))
    BatchNormSums().check(value, model.state_dict())
    mend(value)
    with pytest.raises(InvalidOption, match=what):
        BatchNormSums().check(value, model.state_dict())


def test_a_client_with_single_examples_measures_too():
    """One example in a batch has no variance: it passes the norms by the model's own statistics."""
    model = _net(0)
    question = Question(model.state_dict(), needs=(BatchNormSums(),))
    x, y = _data(3, 0)
    answer = respond(question, model, [(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    found = pooled([question], [(0, [answer])])[0].statistics["batch_norm_sums"]
    assert found["5.running_mean.first"].isfinite().all()


def test_fedkfac_measures_norms_before_the_head():
    state = _net(0).state_dict()
    names = [type(step).__name__ for one in build_pipeline("fedkfac(steps=2)").refinements for step in one.steps(state)]
    assert names == ["RecalibrateStep", "RidgeStep", "NaturalStep", "SecantStep", "GradientStep", "SecantStep"]
    assert Recalibrate().steps({"fc.weight": torch.zeros(2, 2)}) == ()


def test_fedkfac_merges_networks_with_batch_norm_trained_apart():
    """Better than the mean, and no worse on held-out loss than without what comes after the merge."""
    models, loaders = [], []
    for k in range(2):
        model, (x, y) = _net(k), _data(300, k)
        optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(30):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
        models.append(model.eval())
        loaders.append([(x, y)])
    x, y = _data(500, 9)

    def loss(method: str) -> float:
        merged = fedmerge.merge(models, method, clients=loaders, repair="none").eval()
        return float(F.cross_entropy(merged(x), y).detach())

    plain, ours = loss("fedavg"), loss("fedkfac(steps=1)")
    assert ours < 0.5 * plain
    assert ours <= loss("fedkfac(head=none,steps=0)") + 1e-3
