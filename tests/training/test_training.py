"""Local training and evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmerge.errors import ConfigError, InvalidOption
from fedmerge.seeding import batch_indices, generator
from fedmerge.training import LocalTraining, evaluate, train
from fedmerge.training.device import choose_device

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(30) % 3


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))


def trained(seed=0, client=0, round=1, **settings):
    net = model()
    report = train(net, X, Y, LocalTraining(**settings), seed=seed, client=client, round=round)
    return torch.cat([p.detach().flatten() for p in net.parameters()]), report


START = torch.cat([p.detach().flatten() for p in model().parameters()])


def test_the_same_name_draws_the_same_batches_and_dropout():
    assert torch.equal(trained()[0], trained()[0])
    others = [trained(seed=1), trained(client=1), trained(round=2)]
    assert all(not torch.equal(trained()[0], other) for other, _ in others)


@pytest.mark.parametrize("other", [{"seed": 1}, {"client": 1}, {"round": 2}])
@pytest.mark.parametrize("part", ["batches", "dropout"])
def test_batches_and_dropout_each_follow_seed_client_and_round(part, other):
    """One part at a time: without dropout only batches differ, with a batch of everything only dropout."""

    def result(seed=0, client=0, round=1):
        net = model() if part == "dropout" else nn.Sequential(*(m for m in model() if not isinstance(m, nn.Dropout)))
        settings = LocalTraining(learning_rate=0.5, steps=1, batch_size=30 if part == "dropout" else 4)
        # Sums over a whole batch do not depend on its order where all rows are alike.
        x, y = (torch.ones(30, 4), torch.zeros(30, dtype=torch.long)) if part == "dropout" else (X, Y)
        train(net, x, y, settings, seed=seed, client=client, round=round)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(result(), result())
    assert not torch.equal(result(), result(**other))


def plain_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


OPTIMISERS = {
    "sgd": ({"momentum": 0.5}, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5)),
    "decay": ({"momentum": 0.0, "weight_decay": 0.1}, lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1)),
    "adam": ({"optimizer": "adam"}, lambda p: torch.optim.Adam(p, lr=0.05)),
    "adam decay": (
        {"optimizer": "adam", "weight_decay": 0.1},
        lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("kind", OPTIMISERS)
@pytest.mark.parametrize("proximal_mu", [0.0, 0.7])
def test_training_is_the_loop_one_would_write(kind, proximal_mu):
    settings, make = OPTIMISERS[kind]
    net, byhand = plain_model(), plain_model()
    settings = LocalTraining(**settings, learning_rate=0.05, proximal_mu=proximal_mu, epochs=2, batch_size=7)
    report = train(net, X, Y, settings, seed=3, client=1, round=4)

    start, optimiser, losses = [p.detach().clone() for p in byhand.parameters()], make(byhand.parameters()), []
    for rows in batch_indices(len(X), 7, epochs=2, generator=generator(3, "batches", 1, 4)):
        optimiser.zero_grad()
        loss = F.cross_entropy(byhand(X[rows]), Y[rows])
        pull = sum((p - s).square().sum() for p, s in zip(byhand.parameters(), start, strict=True))
        (loss + proximal_mu / 2 * pull).backward()
        optimiser.step()
        losses += [loss.item()] * len(rows)
    for one, two in zip(net.parameters(), byhand.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert report.steps == 10
    assert report.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_labels_of_sequences_train_too():
    net = nn.Linear(4, 3)
    x, y = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30).reshape(6, 5) % 3
    report = train(net, x, y, LocalTraining(learning_rate=1e-12, epochs=1, batch_size=4), seed=0, client=0, round=1)
    assert report.loss == pytest.approx(F.cross_entropy(net(x).flatten(0, 1), y.flatten()).item(), rel=1e-5)


def test_batch_norm_learns_its_statistics():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    train(net.eval(), X + 3, Y, LocalTraining(steps=4, batch_size=10), seed=0, client=0, round=1)
    assert net[0].num_batches_tracked == 4
    assert (net[0].running_mean > 0.3).all()


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"epochs": 1}, 4), ({"epochs": 3}, 12), ({"steps": 5}, 5), ({"steps": 1}, 1), ({}, 8), ({"batch_size": 99}, 2)],
)
def test_steps_are_counted(settings, steps):
    assert trained(**{"batch_size": 8, **settings})[1].steps == steps


def test_loss_is_the_mean_over_the_examples_seen():
    net = nn.Linear(4, 3)
    report = train(net, X, Y, LocalTraining(learning_rate=1e-12, epochs=1, batch_size=7), seed=0, client=0, round=1)
    assert report.loss == pytest.approx(F.cross_entropy(net(X), Y).item(), rel=1e-5)


def test_the_report_tells_the_constants_that_shape_the_steps():
    sgd = trained(momentum=0.5, proximal_mu=0.1, learning_rate=0.2)[1]
    assert (sgd.momentum, sgd.proximal_mu, sgd.learning_rate) == (0.5, 0.1, 0.2)
    adam = trained(optimizer="adam", momentum=0.5, proximal_mu=0.1)[1]
    assert (adam.momentum, adam.proximal_mu) == (0.0, 0.0)


def test_the_proximal_term_pulls_back_to_the_start():
    free, bound = (trained(learning_rate=0.05, epochs=10, proximal_mu=mu)[0] for mu in (0.0, 10.0))
    assert (bound - START).norm() < 0.5 * (free - START).norm()


def test_clipping_bounds_a_step():
    moved = trained(steps=1, momentum=0.0, learning_rate=1.0, clip_norm=0.01)[0] - START
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_frozen_parameters_stay():
    net = model()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    train(net, X, Y, LocalTraining(proximal_mu=1.0), seed=0, client=0, round=1)
    assert torch.equal(before, net[0].weight)
    assert not torch.equal(net[3].weight, model()[3].weight)


def test_no_examples():
    with pytest.raises(InvalidOption, match="client 4 has no examples"):
        train(model(), X[:0], Y[:0], LocalTraining(), seed=0, client=4, round=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "lbfgs"),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("momentum", -0.1),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("proximal_mu", -1.0),
        ("epochs", 0),
        ("steps", 0),
        ("batch_size", 0),
        ("clip_norm", 0.0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(InvalidOption, match=rf"training\.{name}"):
        LocalTraining(**{name: value})


def test_epochs_and_steps_exclude_each_other():
    with pytest.raises(InvalidOption, match=r"training\.steps must be left out where epochs are given"):
        LocalTraining(epochs=1, steps=1)


def test_evaluation_counts_every_label_whatever_the_batches():
    net = model().eval()
    want = F.cross_entropy(net(X), Y).item(), (net(X).argmax(1) == Y).float().mean().item()
    for batch_size in (1, 7, 100):
        assert evaluate(net.train(), X, Y, batch_size=batch_size) == pytest.approx(want, rel=1e-5)  # no dropout


def test_evaluation_of_sequences():
    logits = torch.randn(5, 6, 3)
    labels = logits.argmax(-1)
    labels[0] = (labels[0] + 1) % 3
    loss, accuracy = evaluate(nn.Identity(), logits, labels, batch_size=2)
    assert accuracy == pytest.approx(24 / 30)
    assert loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-5)


def test_devices():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="'tpu9' cannot be used here"):
        choose_device("tpu9")
