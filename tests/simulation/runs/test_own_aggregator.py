"""An aggregator of one's own in one file: merged with by ``module:Aggregator``, wherever a method is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.aggregators import Aggregator
from fedmerge.errors import ConfigError, InvalidOption, UnknownName
from fedmerge.merging import build_pipeline
from fedmerge.simulation import Experiment, compare, make_config
from fedmerge.strategies import MergeStrategy
from tests.outcomes import outcome


@dataclass(frozen=True)
class Mean(Aggregator):
    """The plain mean, times a factor."""

    factor: float = 1.0

    def merge(self, updates, context, memory):
        states = [update.state for update in updates]
        return {name: self.factor * torch.stack([s[name] for s in states]).mean(0) for name in states[0]}, {}


@dataclass(frozen=True)
class Wrong(Aggregator):
    """Raises what is no error of ours."""

    def merge(self, updates, context, memory):
        raise KeyError("a mistake of its own")


class Loose(Aggregator):
    """No dataclass."""

    def merge(self, updates, context, memory):
        return {}, {}


class Nothing(NamedTuple):
    """Nothing of ours."""


@dataclass(frozen=True)
class NoAggregator:
    """Frozen, and nothing else."""


HERE = __name__


def test_models_at_hand_are_merged_by_it_in_a_chain_too():
    a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    mean = (a.weight + b.weight) / 2
    assert torch.allclose(fedmerge.merge([a, b], f"{HERE}:Mean").weight, mean)
    assert torch.allclose(fedmerge.merge([a, b], f"{HERE}:Mean", factor=3.0).weight, 3 * mean)
    pipeline = MergeStrategy(f"{HERE}:Mean+server_momentum", factor=2.0).pipeline
    assert pipeline.aggregator == Mean(2.0)
    assert len(pipeline.server_steps) == 1


def test_it_is_compared_beside_others_and_its_record_gives_it_again(tmp_path):
    method = f"{HERE}:Mean(factor=0.5)"
    base = {"rounds": 1, "partition": {"clients": 2, "scheme": "iid"}, "model": {"name": "logistic"}}
    config = make_config(base, {"methods": ["fedavg", method, f"{HERE}:Mean"]})
    (fedavg, half, whole), failed = compare(config, tmp_path / "one")
    assert not failed
    kinds = [outcome(run)[1]["state"] for run in (fedavg, half, whole)]
    assert kinds[0] != kinds[1]
    again = make_config(config.resolved(method, 0))
    (run,), failed = compare(again, tmp_path / "two")
    assert not failed
    assert outcome(run) == outcome(half)


def test_one_that_raises_ends_its_run_by_name_and_place_and_no_other(tmp_path):
    base = {"rounds": 1, "partition": {"clients": 2, "scheme": "iid"}, "model": {"name": "logistic"}}
    config = make_config(base, {"methods": [f"{HERE}:Wrong", "fedavg"]})
    (finished,), (failed,) = compare(config, tmp_path)
    assert finished.name.startswith("fedavg")
    assert f"{HERE}:Wrong cannot go on: KeyError: 'a mistake of its own'" in str(failed.error)
    assert f"{__file__}, line " in str(failed.error)


def test_in_a_comparison_others_stand_beside_it_and_their_options_in_its_record(tmp_path):
    base = {"rounds": 2, "partition": {"clients": 2, "scheme": "iid"}, "model": {"name": "logistic"}}
    chain = f"trim(density=0.5)+{HERE}:Mean+server_momentum"
    options = {f"{HERE}:Mean": {"factor": 0.5}, "server_momentum": {"momentum": 0.3}}
    alone = f"{HERE}:Mean"
    config = make_config(base, {"methods": [chain, alone], "options": options})
    by_name = build_pipeline("trim(density=0.5)+fedavg+server_momentum(momentum=0.3)")
    pipeline = Experiment(config, 0).strategy(chain).pipeline
    assert (pipeline.edits, pipeline.server_steps) == (by_name.edits, by_name.server_steps)
    assert pipeline.aggregator == Mean(0.5)
    (half, other), failed = compare(config, tmp_path / "one")
    assert not failed
    assert outcome(half)[1]["state"] != outcome(other)[1]["state"]
    resolved = config.resolved(chain, 0)
    assert resolved["options"][f"{HERE}:Mean"] == {"factor": 0.5}
    assert resolved["options"]["server_momentum"]["momentum"] == 0.3
    assert resolved["options"]["trim"]["density"] == 0.5
    again = make_config(resolved)
    assert again.resolved(chain, 0) == resolved
    (run,), failed = compare(again, tmp_path / "two")
    assert not failed
    assert outcome(run) == outcome(half)


@pytest.mark.parametrize(
    ("method", "kind", "words"),
    [
        (f"{HERE}:Mean+server_momentun", UnknownName, "server_momentum"),
        (f"{HERE}:Mean+server_momentum(momentun=0.5)", UnknownName, "Did you mean 'momentum'"),
        (f"trim(density=2)+{HERE}:Mean", InvalidOption, "density"),
    ],
)
def test_what_is_wrong_beside_it_is_told_without_importing_it(method, kind, words):
    with pytest.raises(kind, match=words):
        make_config({"methods": [method]})


@pytest.mark.parametrize(
    ("method", "kind", "words"),
    [
        ("NoAggregator+server_momentum", ConfigError, "leave out server_momentum"),
        ("Mean(facter=2)", UnknownName, "Did you mean 'factor'"),
        ("Mean(factor=much)", InvalidOption, "factor"),
        ("Loose", ConfigError, "frozen=True"),
        ("Mean+fedavg", UnknownName, "has an aggregator already"),
        (f"Mean+{HERE}:Mean", UnknownName, "has an aggregator already"),
    ],
)
def test_what_is_wrong_with_it_is_told_before_anything_is_written(tmp_path, method, kind, words):
    config = make_config({"methods": [f"{HERE}:{method}"], "model": {"name": "logistic"}, "partition": {"clients": 2}})
    with pytest.raises(kind, match=words):
        compare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["NoAggregator", "Nothing"])
def test_what_is_no_aggregator_merges_nothing(name):
    with pytest.raises(ConfigError):
        fedmerge.merge([nn.Linear(1, 1), nn.Linear(1, 1)], f"{HERE}:{name}")
