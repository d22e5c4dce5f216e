"""Configurations: what is accepted, and what is said of the rest."""

from __future__ import annotations

import pytest

from fedmerge.errors import ConfigError, FedMergeError, InvalidOption, TaskError, UnknownName
from fedmerge.merging import build_pipeline
from fedmerge.records.run_records import read_toml, write_toml
from fedmerge.simulation.runs.config import load_config, make_config, parse_assignment


def test_later_layers_win_and_keep_the_rest():
    config = make_config({"training": {"epochs": 3, "learning_rate": 0.5}}, {"training": {"learning_rate": 0.1}})
    assert (config.training.epochs, config.training.learning_rate) == (3, 0.1)


@pytest.mark.parametrize(
    "method",
    ["fedavg", "fednova", "fedatt", "fedavg+server_adam", "fedkfac", "fedavg+ridge_head+natural_gradient(count=1)"],
)
def test_a_resolved_configuration_is_complete_and_gives_itself_again(method, tmp_path):
    config = make_config({"methods": ["fedavg", method] if method != "fedavg" else ["fedavg"], "seeds": [0, 4]})
    resolved = config.resolved(method, 4)
    write_toml(tmp_path / "config.toml", resolved)
    again = make_config(load_config(tmp_path / "config.toml"))
    assert again.methods == (method,)
    assert again.seeds == (4,)
    assert again.resolved(method, 4) == resolved
    written = read_toml(tmp_path / "config.toml")
    assert written["training"]["learning_rate"] == config.training.learning_rate
    assert written["model"]["options"]["hidden"] == [100]
    if method == "fedatt":
        assert written["options"]["fedatt"]["norm"] == "spectral"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fedavg+natural_gradient+ridge_head+natural_gradient(count=2)", {"natural_gradient": {"examples": 50}}),
        ("fedkfac+ridge_head(ridge=1.0)", {}),  # fedkfac has one of its own
    ],
)
def test_two_refinements_of_a_kind_keep_their_own_options(method, options):
    config = make_config({"methods": [method], "options": options})
    resolved = config.resolved(method, 0)
    again = make_config(resolved)
    made = [build_pipeline(method, each.options).refinements for each in (config, again)]
    assert made[0] == made[1]
    assert again.resolved(method, 0) == resolved


def test_schedules_know_the_rounds_of_the_configuration():
    config = make_config({"rounds": 7, "training": {"schedule": "cosine"}})
    assert config.local_training.total_rounds == 7
    assert make_config(config.resolved("fedavg", 0)).local_training.total_rounds == 7
    told = make_config({"rounds": 7, "training": {"total_rounds": 20}})
    assert told.local_training.total_rounds == 20


def test_settings_of_training_are_written_down_and_read_again(tmp_path):
    training = {
        "optimizer": "AdamW", "optimizer_options": {"betas": [0.5, 0.9]}, "schedule": "warmup(length=2)+cosine",
        "step_schedule": "step(every=3)", "accumulate": 2, "autocast": "bfloat16", "patience": 3,
        "train_fn": "mine:train",
    }  # fmt: skip
    config = make_config({"methods": ["fedavg"], "training": training})
    write_toml(tmp_path / "config.toml", config.resolved("fedavg", 0))
    assert make_config(load_config(tmp_path / "config.toml")).training == config.training


def test_data_sets_with_clients_of_their_own_are_divided_among_them():
    natural = make_config({"data": {"name": "heart_disease"}})
    assert (natural.partition.scheme, natural.partition.clients, natural.model.name) == ("natural", None, "logistic")
    chosen = make_config({"data": {"name": "heart_disease"}}, {"partition": {"alpha": 0.5}, "model": {"name": "mlp"}})
    assert (chosen.partition.scheme, chosen.partition.clients, chosen.model.name) == ("dirichlet", 10, "mlp")


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"round": 3}, UnknownName, "Did you mean 'rounds'"),
        ({"training": {"learning_rat": 1}}, UnknownName, "Did you mean 'training.learning_rate'"),
        ({"partition": {"alhpa": 1}}, UnknownName, "Did you mean 'partition.alpha'"),
        ({"data": {"nam": "digits"}}, UnknownName, "Did you mean 'data.name'"),
        ({"rounds": 0}, ConfigError, "rounds = 0"),
        ({"rounds": "many"}, ConfigError, "rounds = 'many'"),
        ({"training": {"learning_rate": -1}}, InvalidOption, "training.learning_rate must be positive, got -1"),
        ({"training": {"steps": 2, "epochs": 2}}, InvalidOption, "training.steps"),
        ({"training": {"optimizer": "adamv"}}, UnknownName, "Did you mean 'adam"),
        ({"training": {"optimizer": "sgd", "optimizer_options": {"nestrov": True}}}, UnknownName, "'nesterov'"),
        ({"training": {"schedule": "cosin"}}, UnknownName, "Did you mean 'cosine'"),
        ({"training": {"patience": 2}, "partition": {"held_out": 0.0}}, ConfigError, "partition.held_out"),
        ({"training": {"autocast": "float8"}}, ConfigError, "training.autocast"),
        ({"training": {"train_fn": "train"}}, InvalidOption, "module:function"),
        ({"methods": ["scaffold"], "training": {"optimizer": "adam"}}, InvalidOption, "read off the steps of SGD"),
        ({"methods": ["feddyn(alpha=0)"]}, InvalidOption, "alpha must be above 0"),
        ({"methods": ["scaffold(population=0)"]}, InvalidOption, "population must be at least 1"),
        ({"partition": {"alpha": 0}}, InvalidOption, "alpha"),
        ({"methods": []}, ConfigError, "methods is empty"),
        ({"methods": ["fedavg", "fedavg"]}, ConfigError, "twice"),
        ({"seeds": []}, ConfigError, "seeds"),
        ({"methods": ["fedvag"]}, UnknownName, "Did you mean 'fedavg'"),
        ({"methods": ["fedavg+adam"]}, UnknownName, "server_adam"),
        ({"options": {"fedat": {}}}, UnknownName, "Did you mean 'fedatt'"),
        ({"options": {"fedatt": {"norms": 1}}}, UnknownName, "Did you mean 'norm'"),
        ({"options": {"fedatt": {"norm": "l1"}}}, InvalidOption, "spectral"),
        ({"fraction_train": 0}, ConfigError, "fraction_train"),
        ({"privacy": {"mask": True}}, UnknownName, "Did you mean 'privacy.masks'"),
        ({"privacy": {"noise": {"clip": 0.0, "noise_multiplier": 1.0}}}, InvalidOption, "clip must be a positive"),
        ({"privacy": {"noise": {"clip": 1.0}}}, ConfigError, "noise_multiplier"),
        ({"privacy": {"noise": {"clip": 1.0, "noise_multiplier": 1.0, "sharers": 3}}}, InvalidOption, "masks=True"),
        (
            {"methods": ["fedfisher"], "privacy": {"masks": True}},
            InvalidOption,
            "FedFisher looks at every client's own fisher_kfac",
        ),
    ],
)
def test_mistakes_are_named(settings, kind, words):
    with pytest.raises(kind) as caught:
        make_config(settings)
    assert words in str(caught.value)
    assert isinstance(caught.value, FedMergeError)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("rounds=3", {"rounds": 3}),
        ("training.learning_rate=0.5", {"training": {"learning_rate": 0.5}}),
        ("model.name=lenet", {"model": {"name": "lenet"}}),
        ("options.fedatt.norm=frobenius", {"options": {"fedatt": {"norm": "frobenius"}}}),
        ("seeds=[1, 2]", {"seeds": [1, 2]}),
        ("data.dir=a=b", {"data": {"dir": "a=b"}}),
    ],
)
def test_assignments(text, want):
    assert parse_assignment(text) == want


@pytest.mark.parametrize("text", ["rounds", "=3"])
def test_assignments_without_key_or_value(text):
    with pytest.raises(ConfigError, match="key=value"):
        parse_assignment(text)


def test_files_that_are_missing_or_no_toml(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("rounds = [1,\nx")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML.*line 2"):
        load_config(broken)
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("task", "kind", "words"),
    [
        ({"name": "regression", "metrics": ["mae", "f1"]}, TaskError, "'f1' counts decisions, and Regression"),
        ({"name": "multilabel", "metrics": ["rmse"]}, TaskError, "'rmse' is of numbers, and"),
        ({"name": "classification", "metrics": ["r2"]}, TaskError, "'r2' is of numbers, and"),
        ({"name": "binary", "metrics": ["perplexity"]}, TaskError, "'perplexity' is of classes, and"),
        ({"loss": "torch.nn.functional:huber_loss", "metrics": ["auroc"]}, TaskError, "'auroc' counts decisions"),
        ({"metrics": ["f2"]}, UnknownName, "unknown metric 'f2'"),
        ({"name": "regression", "metrics": ["mae", "mae"]}, TaskError, "a name of its own"),
    ],
)
def test_metrics_that_a_task_does_not_have_are_told_when_it_is_read(task, kind, words):
    with pytest.raises(kind, match=words):
        make_config({"task": task})


@pytest.mark.parametrize(
    "task",
    [
        {"name": "regression", "metrics": ["mae", "rmse", "r2"]},
        {"name": "classification", "metrics": ["f1", "iou", "auroc", "perplexity", "accuracy"]},
        {"name": "multilabel", "metrics": ["f1", "auroc"]},
        {"name": "language_model", "metrics": ["perplexity"]},
        {"loss": "torch.nn.functional:huber_loss", "metrics": ["mae"]},
        {"name": "classification", "loss": "torch.nn.functional:multi_margin_loss", "metrics": ["f1", "auroc"]},
        {"metrics": ["f1", "mae"]},  # the data set says what the task is
    ],
)
def test_metrics_that_a_task_has_are_taken(task):
    assert make_config({"task": task}).task.metrics == tuple(task["metrics"])
