"""What a training configuration says is done or refused; another head, or other data than ClientData, is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flwr.app import ConfigRecord
from torch import nn

from fedmerge.clients.told_training import told_training
from fedmerge.errors import ConfigError, InvalidOption, ModelError, UnknownName
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import FedAvg, FedProx, MergeStrategy, client_app, from_arrays, to_arrays
from fedmerge.training import LocalTraining
from tests.federation import CLIENTS, TRAINING, initial, plain_model, tiny_app, tiny_data, tiny_model


def trained(config, strategy=None, app=None, rounds=1):
    """The model after a round under a training configuration."""
    strategy = strategy or FedAvg(fraction_evaluate=0.0)
    with SimulationGrid(app or tiny_app(), CLIENTS) as grid:
        result = strategy.start(grid, initial(), num_rounds=rounds, train_config=ConfigRecord(config))
    return from_arrays(result.arrays)


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("usual", "ours"),
    [
        ({"lr": 0.5}, {"learning-rate": 0.5}),
        ({"lr": 0.5, "local-epochs": 3}, {"learning_rate": 0.5, "epochs": 3}),
        ({"local_epochs": 2, "batch_size": 5}, {"epochs": 2, "batch-size": 5}),
        ({"num-epochs": 2}, {"epochs": 2}),
        ({"local-steps": 2, "weight_decay": 0.5}, {"steps": 2, "weight-decay": 0.5}),
        ({"mu": 3.0, "steps": 5}, {"proximal-mu": 3.0, "local-steps": 5}),
    ],
)
def test_flowers_usual_names_train_as_ours_do(usual, ours):
    assert same(trained(usual), trained(ours))
    assert not same(trained(usual), trained({}))


def test_messages_are_read_alike_with_or_without_a_cohort():
    plain, mod = tiny_app(), tiny_app(lambda message, context, call_next: call_next(message, context))
    one, two = (trained({"lr": 0.5, "local-epochs": 2}, app=app) for app in (plain, mod))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name])


@pytest.mark.parametrize("wrong", ["learning-rte", "local_epoch", "foo", "decay", "device"])
def test_what_nobody_reads_is_refused_and_names_the_nearest(wrong):
    with pytest.raises(UnknownName, match=rf"train message '{wrong}'.*Known: accumulate"):
        trained({wrong: 1})


def test_mods_may_read_what_the_client_does_not():
    seen = []

    def mod(message, context, call_next):
        seen.append(message.content["config"]["clip"])
        return call_next(message, context)

    assert trained({"clip": 2.5}, app=tiny_app(mod))
    assert seen == [2.5] * CLIENTS


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"lr": 0.5, "learning-rate": 0.4}, ConfigError, "lr = 0.5 and learning-rate = 0.4"),
        ({"lr": -1.0}, InvalidOption, "learning_rate must be positive"),
        ({"lr": "fast"}, InvalidOption, "wrong type"),
        ({"local-epochs": 2.5}, InvalidOption, "epochs must be a whole number"),
        ({"optimizer": "lion"}, UnknownName, "unknown optimizer 'lion'"),
    ],
)
def test_contradictions_and_wrong_values_are_told_before_anybody_trains(config, error, said):
    with pytest.raises(error, match=said):
        trained(config)


def test_one_of_epochs_and_steps_takes_the_place_of_the_other():
    assert told_training(LocalTraining(epochs=5), ConfigRecord({"steps": 3})).length == (None, 3)
    assert told_training(LocalTraining(steps=5), ConfigRecord({"local-epochs": 3})).length == (3, None)


def test_a_configuration_is_the_callers_own():
    config = ConfigRecord({"lr": 0.5})
    with SimulationGrid(tiny_app(), CLIENTS) as grid:
        for strategy in (MergeStrategy("fednova"), FedProx(proximal_mu=0.5), FedProx(proximal_mu=1.0)):
            strategy.start(grid, initial(), num_rounds=2, train_config=config)
    assert "needs" not in config
    assert "proximal-mu" not in config


@pytest.mark.parametrize("app", [tiny_app(), tiny_app(lambda message, context, call_next: call_next(message, context))])
def test_the_proximal_term_of_fedprox_reaches_the_clients(app):
    held = trained({}, FedProx(proximal_mu=9.0, fraction_evaluate=0.0), app)
    assert same(held, trained({"proximal-mu": 9.0}, app=app))
    assert not same(held, trained({}, app=app))
    assert same(held, trained({}, MergeStrategy("fedprox", proximal_mu=9.0, fraction_evaluate=0.0), app))
    start = from_arrays(initial())["0.weight"]
    assert (held["0.weight"] - start).norm() < (trained({}, app=app)["0.weight"] - start).norm()
    with pytest.raises(ConfigError, match="FedProx sets proximal-mu"):
        trained({"proximal-mu": 1.0}, FedProx(proximal_mu=9.0), app)


def test_fedprox_is_refused_where_training_is_over():
    import fedmerge

    with pytest.raises(InvalidOption, match="trained already"):
        fedmerge.merge([plain_model(), plain_model()], "fedprox")


def other(inputs=4, hidden=6, outputs=3):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (other(outputs=2), r"'2.weight' \[2, 6\] \(here \[3, 6\]\).*outputs are \[2\] and not \[3\]"),
        (other(outputs=7), r"'2.bias' \[7\] \(here \[3\]\)"),
        (other(inputs=5), r"'0.weight' \[6, 5\] \(here \[6, 4\]\); it cannot take"),
        (nn.ModuleDict({"a": nn.Linear(4, 6)}), "missing.*'0.bias'.*unknown.*'a.bias'"),
    ],
)
@pytest.mark.parametrize("method", ["fedavg", "median", "fednova"])
def test_an_initial_model_that_is_not_the_clients_is_told_at_once(model, said, method):
    with SimulationGrid(tiny_app(model_fn=plain_model), CLIENTS) as grid, pytest.raises(ModelError, match=said):
        MergeStrategy(method).start(grid, to_arrays(model.state_dict()), num_rounds=2)


def test_a_wider_initial_model_decides_the_width():
    with SimulationGrid(tiny_app(model_fn=plain_model), CLIENTS) as grid:
        result = FedAvg(fraction_evaluate=0.0).start(grid, to_arrays(other(hidden=9).state_dict()), num_rounds=1)
    assert from_arrays(result.arrays)["0.weight"].shape == (9, 4)


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adam", "optimizer-options": '{"betas": [0.5, 0.6]}'},
        {"schedule": "step(every=1,factor=0.01)", "lr": 0.3},
        {"schedule": "cosine", "total-rounds": 2},
        {"step-schedule": "warmup(length=9)"},
        {"clip-norm": 0.01},
    ],
)
def test_optimisers_and_schedules_are_told_by_messages_and_in_the_client_alike(config):
    """Two rounds, for the first of a schedule is often as usual."""
    names = {"lr": "learning_rate"}
    own = replace(TRAINING, **{names.get(key, key.replace("-", "_")): value for key, value in config.items()})
    told, known, usual = (
        trained(given, app=client_app(tiny_model, tiny_data, training=training), rounds=2)
        for given, training in ((config, TRAINING), ({}, own), ({}, TRAINING))
    )
    assert same(told, known)
    assert not same(told, usual)


@pytest.mark.parametrize(
    "config",
    [{"train-fn": "os:system"}, {"schedule": "os:system"}, {"step-schedule": "cosine+os:system"}],
)
def test_a_server_cannot_have_clients_import_code(config):
    with pytest.raises(ConfigError, match="a server may not have clients import code"):
        told_training(LocalTraining(), ConfigRecord(config))
