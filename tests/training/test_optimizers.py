"""Any optimiser of torch trains a client as torch's own loop does, and unknown names and options are told."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmerge.data.client_data import examples_of
from fedmerge.errors import CannotStack, InvalidOption, UnknownName
from fedmerge.seeding import batch_indices, generator
from fedmerge.tasks import Classification, Multilabel
from fedmerge.training import LocalTraining, Participant, choose_engine, train, train_cohort

TORCHS = {
    "adamw": (torch.optim.AdamW, {}),
    "AdamW ": (torch.optim.AdamW, {"weight_decay": 0.3}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.5, "momentum": 0.3}),
    "nadam": (torch.optim.NAdam, {"betas": [0.5, 0.9]}),
    "adagrad": (torch.optim.Adagrad, {}),
    "sgd": (torch.optim.SGD, {"nesterov": True}),
}


def examples(n=14, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=rng), torch.randint(2, (n,), generator=rng)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def plain_loop(model, x, y, optimizer, batch_size, epochs, rate=lambda step: None):
    """What anybody would write."""
    order = batch_indices(len(x), batch_size, epochs=epochs, generator=generator(0, "batches", 5, 2))
    for step, rows in enumerate(order):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        if rate(step) is not None:
            optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    return model


def same(one, other, **tolerance):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("name", TORCHS)
def test_an_optimiser_by_name_trains_as_torchs_own(name):
    kind, options = TORCHS[name]
    (x, y), found, want = examples(), net(), net()
    given = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    plain_loop(want, x, y, kind(want.parameters(), lr=0.02, **given, **options), 4, 2)
    decay = options.get("weight_decay")
    others = {option: value for option, value in options.items() if option != "weight_decay"}
    settings = LocalTraining(name.strip(), 0.02, weight_decay=decay, optimizer_options=others, epochs=2, batch_size=4)
    train(found, x, y, settings, seed=0, client=5, round=2)
    same(found, want)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "weight_decay": 0.2, "optimizer_options": {"betas": [0.5, 0.8], "eps": 1e-4}},
        {"optimizer": "adam", "weight_decay": 0.1, "optimizer_options": {"betas": [0.5, 0.8]}, "proximal_mu": 0.3},
    ],
)
def test_optimisers_that_stack_end_where_serial_training_does(settings):
    settings = LocalTraining(learning_rate=0.02, epochs=3, batch_size=4, **settings)
    people = [Participant(client, *examples(n, client)) for client, n in enumerate((9, 14, 3))]
    stacked = train_cohort(net(), people, settings, seed=0, round=1)
    for k, one in enumerate(people):
        alone = net()
        train(alone, one.x, one.y, settings, seed=0, client=one.client, round=1)
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(stacked.states[name][k], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"optimizer": "rmsprop"}, "rmsprop steps one client"),
        ({"optimizer": "adam", "optimizer_options": {"amsgrad": True}}, "amsgrad steps one client"),
        ({"autocast": "bfloat16"}, "training.autocast"),
        ({"patience": 2}, "training.patience"),
        ({"accumulate": 2}, "training.accumulate"),
        ({"train_fn": "somewhere:train"}, "a training function of one's own"),
    ],
)
def test_what_one_client_at_a_time_can_do_is_not_stacked(settings, reason):
    settings, people = LocalTraining(**settings), [Participant(0, *examples())]
    with pytest.raises(CannotStack, match=reason):
        train_cohort(net(), people, settings, seed=0, round=1)
    chosen = choose_engine(net(), people, settings, seed=0, round=1)
    assert chosen.name == "serial"
    assert reason in chosen.reason


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"optimizer": "adamv"}, UnknownName, "Did you mean 'adam"),
        ({"optimizer": "rms"}, UnknownName, "Known: adadelta"),
        ({"optimizer": "LBFGS"}, InvalidOption, "several times in a step"),
        ({"optimizer": 3}, InvalidOption, "training.optimizer"),
        ({"optimizer": "adam", "optimizer_options": {"beta": [0.9, 0.99]}}, UnknownName, "Did you mean 'betas'"),
        ({"optimizer": "adam", "optimizer_options": {"betas": [2.0, 0.9]}}, InvalidOption, "beta"),
        ({"optimizer": "adam", "optimizer_options": {"lr": 0.1}}, InvalidOption, "training.learning_rate"),
        ({"optimizer_options": {"momentum": 0.5}}, InvalidOption, "training.momentum"),
        ({"optimizer_options": {"weight_decay": 0.5}}, InvalidOption, "training.weight_decay"),
        ({"optimizer_options": "{nesterov: 1}"}, InvalidOption, "JSON"),
        ({"optimizer_options": ["nesterov"]}, InvalidOption, "table of options"),
        ({"optimizer": "rprop", "weight_decay": 0.1}, InvalidOption, "rprop has none"),
        ({"momentum": 0.0, "optimizer_options": {"nesterov": True}}, InvalidOption, "Nesterov"),
    ],
)
def test_optimisers_and_options_that_do_not_exist_are_told(settings, error, words):
    with pytest.raises(error, match=words):
        LocalTraining(**settings)


def test_options_from_a_message_are_json_and_settings_stay_comparable():
    one = LocalTraining("adam", optimizer_options='{"betas": [0.5, 0.9]}')
    other = LocalTraining("ADAM", optimizer_options={"betas": [0.5, 0.9]})
    assert one == other
    assert hash(one) == hash(other)
    assert one != LocalTraining("adam")


def test_an_optimiser_that_does_not_take_the_models_tensors_is_told():
    """Muon takes matrices, and models have biases."""
    with pytest.raises(InvalidOption, match=r"training\.optimizer = 'muon'"):
        train(net(), *examples(), LocalTraining("muon"), seed=0, client=0, round=1)


def test_steps_over_several_batches_are_those_of_the_whole():
    (x, y), found, want = examples(23), net(), net()
    parts = LocalTraining(learning_rate=0.1, epochs=3, batch_size=2, accumulate=4)
    whole = LocalTraining(learning_rate=0.1, epochs=3, batch_size=8)
    one = train(found, x, y, parts, seed=0, client=5, round=2)
    two = train(want, x, y, whole, seed=0, client=5, round=2)
    same(found, want)
    assert one.steps == two.steps == 9
    assert one.loss == pytest.approx(two.loss, rel=1e-5)


def weighted_classes(n):
    return torch.arange(n) % 3, Classification(class_weights=(1.0, 5.0, 0.2)), nn.Linear(4, 3)


def padded_pixels(n):
    labels = torch.arange(6 * n).view(n, 6) % 3
    labels[: n // 2, 1:] = -100
    labels[::5] = -100
    return labels, None, nn.Sequential(nn.Linear(4, 18), nn.Unflatten(1, (3, 6)))


def unanswered(n):
    labels = torch.arange(2 * n).view(n, 2) % 2
    labels[: n // 2, 0] = -1
    return labels, Multilabel(ignore_index=-1, pos_weight=(3.0, 1.0)), nn.Linear(4, 2)


@pytest.mark.parametrize("kind", [weighted_classes, padded_pixels, unanswered])
def test_steps_over_several_batches_count_every_label_the_same(kind):
    """However unevenly the labels that count lie in them."""
    x = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))
    y, task, found = kind(len(x))
    want, named = copy.deepcopy(found), {"seed": 0, "client": 5, "round": 2, "task": task}
    usual = {"learning_rate": 0.1, "epochs": 2}
    one = train(found, x, y, LocalTraining(**usual, batch_size=2, accumulate=4), **named)
    two = train(want, x, y, LocalTraining(**usual, batch_size=8), **named)
    same(found, want)
    assert one.loss == pytest.approx(two.loss, rel=1e-5)


def test_mixed_precision_rounds_the_forward_pass_and_not_the_weights():
    (x, y), mixed, full = examples(), net(), net()
    usual = {"learning_rate": 0.1, "epochs": 5, "batch_size": 7}
    seen = set()
    mixed[0].register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    named = {"seed": 0, "client": 0, "round": 1}
    train(mixed, x, y, LocalTraining(**usual, autocast="bfloat16"), **named)
    train(full, x, y, LocalTraining(**usual), **named)
    assert seen == {torch.bfloat16}
    apart = max(float((a - b).detach().abs().max()) for a, b in zip(mixed.parameters(), full.parameters(), strict=True))
    assert 0 < apart < 0.05
    assert all(p.dtype == torch.float32 for p in mixed.parameters())


class TestEarlyStopping:
    """The model of the best pass is sent, and its steps are those that count."""

    def trained(self, patience, held_out, epochs=12, rate=1.0, **settings):
        model, (x, y) = net(), examples()
        settings = LocalTraining(
            learning_rate=rate, momentum=0.0, epochs=epochs, batch_size=5, patience=patience, **settings
        )
        return model, train(
            model, x, y, settings, seed=0, client=0, round=1, held_out=held_out and examples_of(*held_out)
        )

    def held_out(self):
        x, y = examples()
        return x[:6] + 0.1, 1 - y[:6]  # what the client learns makes it worse here

    def test_the_best_pass_is_sent(self):
        model, report = self.trained(2, self.held_out())
        first, after_one = self.trained(None, None, epochs=1)
        assert report.steps == after_one.steps == 3
        assert report.loss == pytest.approx(after_one.loss)
        same(model, first, rtol=0, atol=0)

    def test_it_goes_on_as_long_as_it_gets_better(self):
        x, y = examples()
        _, report = self.trained(1, (x, y), rate=0.01)
        assert report.steps == 12 * 3

    def test_clients_that_hold_out_nothing_train_to_the_end(self):
        x, y = examples()
        model, report = self.trained(1, (x[:0], y[:0]))
        other, _ = self.trained(None, None)
        assert report.steps == 12 * 3
        same(model, other, rtol=0, atol=0)

    def test_buffers_are_those_of_the_best_pass_too(self):
        x, y = examples()
        settings = {"learning_rate": 1.0, "momentum": 0.0, "batch_size": 5}
        norms = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(2)]
        norms[1].load_state_dict(copy.deepcopy(norms[0].state_dict()))
        named = {"seed": 0, "client": 0, "round": 1}
        stopping = LocalTraining(**settings, epochs=9, patience=2)
        report = train(norms[0], x, y, stopping, **named, held_out=examples_of(*self.held_out()))
        assert report.steps in range(3, 8 * 3, 3)
        train(norms[1], x, y, LocalTraining(**settings, epochs=report.steps // 3), **named)
        for name, tensor in norms[1].state_dict().items():
            assert torch.equal(tensor, norms[0].state_dict()[name]), name


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_schedule_within_a_round_is_that_of_a_plain_loop(momentum):
    (x, y), found, want = examples(), net(), net()
    text = "warmup(length=3)+cosine(floor=0.1)"
    optimizer = torch.optim.SGD(want.parameters(), lr=0.2, momentum=momentum)

    def rate(step):
        return 0.2 * min(1, (step + 1) / 3) * (0.1 + 0.9 * (1 + np.cos(np.pi * step / 8)) / 2)

    plain_loop(want, x, y, optimizer, 4, 2, rate)
    settings = LocalTraining(learning_rate=0.2, momentum=momentum, epochs=2, batch_size=4, step_schedule=text)
    train(found, x, y, settings, seed=0, client=5, round=2)
    same(found, want)
