"""fedkfac on models that started together and on models that did not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fedmerge
import fedmerge.permutations
from fedmerge.errors import InvalidOption
from fedmerge.merging import build_pipeline
from fedmerge.offline.merge import asked_at_hand
from fedmerge.questions import respond
from fedmerge.state import module_state
from fedmerge.statistics import FisherKfac, Gram
from fedmerge.statistics.sending.compression import state_bytes
from fedmerge.statistics.sending.settings import compressed
from fedmerge.training import LocalTraining, train
from fedmerge.update import ClientUpdate, MergeContext


def digits_like(client, n=90, seed=0):
    """Client k sees hardly anything but class k."""
    generator = torch.Generator().manual_seed(10 * seed + client)
    means = 0.8 * torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    y = torch.where(torch.rand(n, generator=generator) < 0.95, client, torch.randint(3, (n,), generator=generator))
    return means[y] + torch.randn(n, 6, generator=generator), y


def net(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


def trained(seeds):
    models = []
    for client, seed in enumerate(seeds):
        model = net(seed)
        train(model, *digits_like(client), LocalTraining(epochs=20, learning_rate=0.1), seed=0, client=client, round=1)
        models.append(model)
    return models


LOADERS = [[digits_like(client)] for client in range(3)]


def accuracy(model):
    fresh = [digits_like(client, 300, seed=1) for client in range(3)]
    x, y = torch.cat([x for x, _ in fresh]), torch.cat([y for _, y in fresh])
    return float((model(x).argmax(1) == y).float().mean())


def test_it_beats_the_mean_of_clients_with_skewed_labels():
    models = trained([0, 0, 0])
    mean = fedmerge.merge(models, "fedavg")
    merged = fedmerge.merge(models, "fedkfac", base=net(0), clients=LOADERS)
    assert accuracy(merged) > accuracy(mean) + 0.02


def test_models_trained_apart_are_aligned_first():
    models = trained([0, 1, 2])
    mean = fedmerge.merge(models, "fedavg")
    merged = fedmerge.merge(models, "fedkfac", clients=LOADERS, head="none", steps=0)
    assert accuracy(merged) > accuracy(mean) + 0.02


def test_models_of_one_start_keep_their_order():
    models = trained([0, 0, 0])
    statistics = [
        fedmerge.compute_statistics(m, loader, ["fisher_kfac"]) for m, loader in zip(models, LOADERS, strict=True)
    ]
    ours = fedmerge.merge(models, "fedkfac", statistics=statistics, head="none", steps=0, example=torch.zeros(2, 6))
    plain = fedmerge.merge(models, "fedfisher", statistics=statistics, damping=0.5)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


@pytest.mark.parametrize(("method", "starts"), [("fedkfac(steps=0)", 3), ("fedfisher+ridge_head", 2)])
def test_it_may_go_on_from_the_largest_clients_own_model(method, starts):
    models = trained([0, 1, 2])
    asked, at_hand = [], asked_at_hand(models[0], LOADERS)

    def ask(questions, clients):
        asked.append(questions)
        return at_hand(questions, clients)

    pipeline = build_pipeline(method)
    updates = []
    for client, (model, weight) in enumerate(zip(models, (10, 12, 11), strict=True)):
        values = fedmerge.compute_statistics(model, LOADERS[client], list(pipeline.measured))
        updates.append(ClientUpdate(client, module_state(model)[0], weight, values))
    pipeline.merge(updates, MergeContext(example=torch.zeros(2, 6), model_fn=lambda: net(0), ask=ask))
    x, found = digits_like(0)[0], []
    for question in asked[0]:
        start = net(0)
        start.load_state_dict(dict(question.base))
        found.append(torch.allclose(start(x), models[1](x), atol=1e-5))
    assert found == [False, False, True][:starts]


@pytest.mark.parametrize(("round", "keeps"), [(1, False), (2, True)])
def test_after_the_first_round_no_merge_replaces_a_better_model_that_was_sent(round, keeps):
    good = fedmerge.merge(trained([0, 0, 0]), "fedkfac", base=net(0), clients=LOADERS)
    base, ask = module_state(good)[0], asked_at_hand(good, LOADERS)
    updates = []
    for client in range(3):
        draws = torch.Generator().manual_seed(3)
        astray = {name: 40 * torch.randn(tensor.shape, generator=draws) for name, tensor in base.items()}
        values = fedmerge.compute_statistics(good, LOADERS[client], ["fisher_kfac"])
        updates.append(ClientUpdate(client, astray, 10, values))
    context = MergeContext(base=base, round=round, example=torch.zeros(2, 6), model_fn=lambda: net(0), ask=ask)
    merged = net(0)
    merged.load_state_dict(build_pipeline("fedkfac(steps=1)").merge(updates, context).state)
    assert (accuracy(merged) >= accuracy(good) - 0.01) == keeps


@pytest.mark.parametrize("kind", [FisherKfac(), Gram()])
def test_what_clients_measured_follows_their_neurons(kind):
    """The statistic of a re-ordered model is the re-ordered statistic of the model."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 5),
        nn.ReLU(), nn.Linear(5, 2, bias=False),
    )  # fmt: skip
    x, y = torch.randn(20, 1, 6, 6), torch.randint(2, (20,))
    spec = fedmerge.permutations.trace(model, x[:2])
    perms = spec.random(torch.Generator().manual_seed(0))
    moved = copy.deepcopy(model)
    moved.load_state_dict(spec.apply(model.state_dict(), perms))
    value = kind.reordered(
        kind.measure(model, [(x, y)], None), model.state_dict(), lambda state: spec.apply(state, perms)
    )
    for name, tensor in kind.measure(moved, [(x, y)], None).items():
        torch.testing.assert_close(value[name], tensor, rtol=1e-4, atol=1e-6)


def test_its_parts_are_refinements_of_any_method():
    ours = build_pipeline("fedkfac(steps=1)")
    assert [type(part).__name__ for part in ours.refinements] == ["Recalibrate", "RidgeHead", "NaturalGradient"]
    other = build_pipeline("fednova+server_momentum+ridge_head(ridge=0.1)+natural_gradient(count=3)")
    assert [type(part).__name__ for part in other.refinements] == ["RidgeHead", "NaturalGradient"]
    assert len(other.server_steps) == 1


@pytest.mark.parametrize("options", [{"head": "cosine"}, {"steps": -1}, {"combine": "rebasin"}])
def test_wrong_options_are_named(options):
    with pytest.raises(InvalidOption, match=str(next(iter(options)))):
        build_pipeline("fedkfac", {"fedkfac": options})


@pytest.mark.parametrize("budget", [2.0, 3.0, 6.0])
def test_no_client_sends_more_than_the_budget(budget, monkeypatch):
    models, sent, first = trained([0, 0, 0]), {}, {}
    size = 4 * sum(p.numel() for p in models[0].parameters())

    def noted(question, module, batches, *others):
        answer = respond(question, module, batches, *others)
        spent = sum(map(state_bytes, answer.statistics.values())) + answer.losses.nbytes
        sent[id(batches)] = sent.get(id(batches), 0) + spent
        return answer

    def travelled(values, *others):
        result = compressed(values, *others)
        first[len(first)] = sum(map(state_bytes, result[0].values()))
        return result

    monkeypatch.setattr("fedmerge.offline.merge.respond", noted)
    monkeypatch.setattr("fedmerge.offline.compute.compressed", travelled)
    fedmerge.merge(models, "fedkfac", base=net(0), clients=LOADERS, budget=budget)
    most = size + max(first.values()) + max(sent.values(), default=0)
    assert most <= budget * size + 400  # the losses of a last judgement, which has to be taken
    assert most > size + max(first.values())
