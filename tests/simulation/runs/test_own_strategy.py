"""``module:Strategy`` in a comparison: options behind the name, the current directory, the settings of the run."""

from __future__ import annotations

import sys

import pytest

from fedmerge.errors import ConfigError, FedMergeError
from fedmerge.simulation import make_config
from fedmerge.simulation.runs.compare import compare
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.strategies import MergeStrategy
from tests.simulation.runs.test_compare import BASE, ignore, rows

SOURCE = '''
import flwr.serverapp.strategy
import fedmerge.errors
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from fedmerge.strategies import FedAvg, MergeStrategy

class Mine(MergeStrategy):
    def __init__(self, rate=1.0, method="fedavg", **keywords):
        super().__init__(method, **keywords)
        self.rate = rate

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, replies)

class Narrow(MergeStrategy):
    """Whose constructor knows nothing of seeds and policies."""

    def __init__(self, fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes, min_available_nodes):
        super().__init__("fedatt", fraction_train=fraction_train, fraction_evaluate=fraction_evaluate,
                         min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)

def private(**keywords):
    return DifferentialPrivacyServerSideFixedClipping(
        FedAvg(**keywords), noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=2)

class Foreign(flwr.serverapp.strategy.FedAvg):
    """Flower's, and yet it takes the settings of a run."""

    def adopt(self, run):
        if run.privacy.masks:
            raise fedmerge.errors.InvalidOption("it knows no masks")
        self.run = run

broken = 3
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A current directory with a module in it, which nothing else has made importable."""
    (tmp_path / "own_strategies_for_test.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("own_strategies_for_test", None)


def experiment(*layers, seed=5):
    return Experiment(make_config(BASE, {"seeds": [seed]}, *layers), seed)


def made(name, *layers, **keywords):
    return experiment(*layers, **keywords).strategy(f"own_strategies_for_test:{name}")


def test_options_stand_behind_the_name_and_win_over_the_table(tmp_path):
    table = {"options": {"own_strategies_for_test:Mine": {"rate": 0.5, "method": "median"}}}
    strategy = made("Mine(rate=0.25)", table)
    assert (strategy.rate, strategy.pipeline.needs) == (0.25, ())
    assert type(strategy.pipeline.aggregator).__name__ == "Median"


def test_one_strategy_runs_at_two_settings_beside_each_other(tmp_path):
    methods = ["own_strategies_for_test:Mine(method=median)", "own_strategies_for_test:Mine(method=fedavg)", "fedavg"]
    config = make_config(BASE, {"methods": methods, "seeds": [0]})
    median, mine, ours = compare(config, tmp_path / "out", ignore).runs
    assert median.name == "own_strategies_for_test.Mine-method=median-seed0"
    assert rows(median, times=False)[-1]["test_loss"] != rows(mine, times=False)[-1]["test_loss"]
    same = ("test_loss", "train_loss", "clients_ok")
    for one, other in zip(rows(mine)[1:], rows(ours)[1:], strict=True):
        assert [one[key] for key in same] == pytest.approx([other[key] for key in same], rel=1e-4)


@pytest.mark.parametrize("name", ["Mine", "Narrow"])
def test_the_settings_of_the_run_reach_a_strategy_that_derives_from_ours(name):
    asked = {
        "batch_norm": "pooled",
        "on_bad_update": "raise",
        "on_client_error": "raise",
        "on_too_few": "skip",
        "min_clients": 2,
        "round_timeout": 9.0,
        "statistics": {"examples": 7},
    }
    strategy = made(name, asked, {"server_examples": 10})
    assert strategy.seed == 5
    pipeline, policies = strategy.pipeline, strategy.policies
    assert (pipeline.batch_norm, pipeline.on_bad_update, pipeline.min_updates) == ("pooled", "raise", 2)
    assert (policies.on_client_error, policies.on_too_few, policies.round_timeout) == ("raise", "skip", 9.0)
    assert pipeline.statistics.examples == 7
    needy = experiment({"server_examples": 10}).strategy("own_strategies_for_test:Mine(method=otfusion)")
    assert needy.travel.model_fn is not None
    assert sum(len(inputs) for inputs, _ in needy._data) == 10


def test_they_reach_one_that_a_wrapper_hides():
    assert made("private", {"batch_norm": "pooled"}).strategy.pipeline.batch_norm == "pooled"
    assert made("private").strategy.seed == 5


def test_they_reach_one_that_is_none_of_ours_and_asks_for_them():
    strategy = made("Foreign", {"batch_norm": "pooled", "on_too_few": "skip"})
    assert (strategy.run.seed, strategy.run.batch_norm, strategy.run.policies.on_too_few) == (5, "pooled", "skip")
    with pytest.raises(ConfigError, match="it knows no masks"):
        made("Foreign", {"methods": ["fedavg"], "privacy": {"masks": True}})


def test_what_the_strategy_says_itself_stays_and_contradictions_are_told():
    assert made("Mine(batch_norm=pooled)").pipeline.batch_norm == "pooled"
    for text, layer, said in (
        ("Mine(batch_norm=pooled)", {"batch_norm": "recalibrate"}, "batch_norm = 'pooled', the run 'recalibrate'"),
        ("Mine(seed=3)", {}, "seed=3, and the run has seed 5"),
        ("Mine(min_clients=3)", {"min_clients": 2}, "min_clients = 3, the run 2"),
        ("Mine(on_too_few=skip,checkpoint_dir=here)", {}, "checkpoint_dir"),
        (
            "Mine",
            {"privacy": {"masks": True}, "options": {"own_strategies_for_test:Mine": {"method": "regmean"}}},
            "gram",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            made(text, {"methods": ["fedavg"]}, layer)


def test_flowers_own_strategies_refuse_what_they_cannot_honour():
    for layer in ({"batch_norm": "pooled"}, {"on_bad_update": "raise"}, {"privacy": {"masks": True}}):
        (name,) = layer
        with pytest.raises(ConfigError, match=rf"knows nothing of {name}"):
            experiment({"methods": ["flwr.serverapp.strategy:FedAvg"]}, layer).strategy(
                "flwr.serverapp.strategy:FedAvg"
            )


def test_mistakes_in_the_name_are_told_as_for_models():
    for text, said in (
        ("own_strategies_for_test:Missing", "has no part 'Missing'"),
        ("own_strategies_for_test:", "lacks a part"),
        ("no_such_module_here:Mine", "cannot import module 'no_such_module_here'.*directory"),
        ("own_strategies_for_test:broken", "cannot make a Flower strategy.*not callable"),
        ("own_strategies_for_test:Mine(fraction_trian=1)", "Did you mean 'fraction_train'"),
        ("flwr.serverapp.strategy:FedAvgM(server_momentun=1)", "unexpected keyword argument 'server_momentun'"),
        ("builtins:dict", "is no flwr.serverapp.strategy.Strategy but a dict"),
        ("own_strategies_for_test:Mine+server_momentum", "leave out server_momentum"),
    ):
        with pytest.raises(ConfigError, match=said):
            experiment().strategy(text)


def test_usual_names_of_methods_run_with_their_options_and_records_load_again(tmp_path):
    methods = ["fedadam(learning_rate=0.05)", "fedyogi", "fedavgm", "fedadagrad", "fedprox(proximal_mu=0.0)", "fedavg"]
    layers = {"methods": methods, "seeds": [0], "rounds": 1}, {"options": {"fedavgm": {"momentum": 0.5}}}
    config = make_config(BASE, *layers)
    runs = compare(config, tmp_path / "out", ignore).runs
    last = {folder.name: rows(folder)[-1]["test_loss"] for folder in runs}
    assert last["fedprox-proximal_mu=0.0-seed0"] == last["fedavg-seed0"]
    assert len(set(last.values())) == 4  # one step of momentum is none, so fedavgm ends there too
    resolved = config.resolved("fedavgm", 0)
    assert resolved["options"] == {"server_momentum": {"momentum": 0.5, "learning_rate": 1.0}}
    again = make_config(resolved)
    assert Experiment(again, 0).strategy("fedavgm").pipeline == Experiment(config, 0).strategy("fedavgm").pipeline


def test_an_unknown_method_names_the_nearest_usual_name():
    for wrong, right in (("fedadm", "fedadam"), ("fedproxy", "fedprox")):
        with pytest.raises(FedMergeError, match=f"Did you mean '{right}'"):
            MergeStrategy(wrong)
