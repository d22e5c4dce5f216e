"""Hostile clients: what they do, that they do it in every setting, and that the record says so."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch

from fedmerge.data import ClientData
from fedmerge.errors import ConfigError, InvalidOption, UnknownName
from fedmerge.simulation import Experiment, SimulationGrid, compare, load_config, make_config
from fedmerge.simulation.runs.global_judge import Judge
from fedmerge.simulation.scenarios.attacks import Backdoor, GaussianNoise, LabelFlip, ScaledUpdate, SignFlip
from fedmerge.simulation.scenarios.hostile_clients import Hostile, HostileDataFn, chosen_attackers
from fedmerge.strategies import MergeStrategy, client_app, from_arrays
from tests.federation import CLIENTS, TRAINING, initial, tiny_data, tiny_model

BASE = {"w": torch.tensor([1.0, 2.0]), "t": torch.tensor(1.0)}
STATE = {"w": torch.tensor([3.0, 1.0]), "t": torch.tensor(2.0)}
CONFIG = {
    "methods": ["fedavg"],
    "rounds": 2,
    "partition": {"clients": 5, "alpha": 1.0},
    "model": {"name": "mlp", "options": {"hidden": [8]}},
    "evaluate_clients": False,
}


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=10):
    draw = torch.Generator().manual_seed(1)
    x, y = torch.rand(count, 1, 4, 4, generator=draw), torch.arange(count) % 5
    return ClientData(x, y, x[:2], y[:2])


def test_models_are_tampered_with_as_written():
    assert SignFlip(scale=2.0).sent(STATE, BASE, noise())["w"].tolist() == [-3.0, 4.0]
    assert ScaledUpdate(scale=10.0).sent(STATE, BASE, noise())["w"].tolist() == [21.0, -8.0]
    big = {"w": torch.zeros(10_000)}
    sent = GaussianNoise(deviation=0.5).sent(big, big, noise())["w"]
    assert sent.std().item() == pytest.approx(0.5, rel=0.05)
    assert not big["w"].any()


def test_labels_are_mirrored_and_those_held_out_are_not():
    data = images()
    flipped = LabelFlip().poisoned(data, 5, np.random.default_rng(0))
    assert (flipped.train_y + data.train_y).tolist() == [4] * 10
    assert flipped.train_x is data.train_x
    assert flipped.held_out_y is data.held_out_y


def test_a_backdoor_stamps_its_share_and_is_judged_on_other_classes():
    data, attack = images(), Backdoor(target=3, share=0.35, size=2, value=9.0)
    poisoned = attack.poisoned(data, 5, np.random.default_rng(0))
    stamped = (poisoned.train_x[:, 0, -2:, -2:] == 9.0).all(-1).all(-1)
    assert stamped.sum() == 4
    assert (poisoned.train_y[stamped] == 3).all()
    assert torch.equal(poisoned.train_y[~stamped], data.train_y[~stamped])
    assert torch.equal(poisoned.train_x[~stamped], data.train_x[~stamped])
    assert (poisoned.train_x[:, :, :2] == data.train_x[:, :, :2]).all()
    assert not (data.train_x == 9.0).any()
    x, target = attack.triggered(data.train_x, data.train_y)
    assert (len(x), target) == (8, 3)
    assert (x[:, 0, -2:, -2:] == 9.0).all()


def test_attackers_are_chosen_by_the_seed_and_grow_with_the_share():
    groups = [chosen_attackers(3, 20, share) for share in (0.0, 0.1, 0.2, 0.4, 1.0)]
    assert [len(group) for group in groups] == [0, 2, 4, 8, 20]
    assert all(a <= b for a, b in pairwise(groups))
    assert chosen_attackers(3, 20, 0.2) == groups[2]
    assert len({chosen_attackers(seed, 20, 0.2) for seed in range(5)}) > 1


class Messages(MergeStrategy):
    """One that looks at replies, and so gets messages."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, list(replies))


def trained(attack, kind, engine, method="fedavg"):
    hostile = Hostile(attack, frozenset({1}), 3, 0)
    app = client_app(tiny_model, HostileDataFn(tiny_data, hostile), training=TRAINING, tamper=hostile)
    with SimulationGrid(app, CLIENTS, engine=engine) as grid:
        strategy = kind(method, model_fn=tiny_model, fraction_evaluate=0.0)
        return from_arrays(strategy.start(grid, initial(), num_rounds=2).arrays)


@pytest.mark.parametrize("attack", [LabelFlip(), SignFlip(2.0), ScaledUpdate(), GaussianNoise(0.1)], ids=str)
@pytest.mark.parametrize("method", ["fedavg", "fisher"])
def test_every_setting_has_the_same_attack(attack, method):
    messages = trained(attack, Messages, "serial", method)
    serial = trained(attack, MergeStrategy, "serial", method)
    stacked = trained(attack, MergeStrategy, "stacked", method)
    honest = trained(SignFlip(scale=1e-12), MergeStrategy, "serial", method)
    for name, tensor in messages.items():
        assert torch.equal(tensor, serial[name]), name
        torch.testing.assert_close(stacked[name], tensor, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(honest["0.weight"], serial["0.weight"], atol=1e-3)


def test_only_attackers_attack():
    hostile = Hostile(SignFlip(), frozenset({1}), 3, 0)
    assert hostile(STATE, BASE, 0, 1) is STATE
    assert hostile(STATE, BASE, 1, 1)["t"] == 0.0
    data = images()
    assert Hostile(LabelFlip(), frozenset({1}), 5, 0).examples(data, 0) is data
    noisy = Hostile(GaussianNoise(), frozenset({1}), 5, 0)
    assert not torch.equal(noisy(STATE, BASE, 1, 1)["w"], noisy(STATE, BASE, 1, 2)["w"])


def test_the_record_names_attackers_and_what_they_reach(tmp_path):
    attack = {"kind": "backdoor", "share": 0.4, "options": {"target": 2, "scale": 2.0}}
    config = make_config(CONFIG, {"attack": attack})
    (folder,) = compare(config, tmp_path, lambda row: None).runs
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    want = sorted(chosen_attackers(0, 5, 0.4))
    assert [row["attackers"] for row in rows] == [want] * 3
    assert all(0 <= row["attack_success"] <= 1 for row in rows)
    text = (folder / "config.toml").read_text()
    assert 'kind = "backdoor"' in text
    assert "size = 2" in text  # defaults are written out
    (plain,) = compare(make_config(CONFIG), tmp_path / "plain", lambda row: None).runs
    assert "attackers" not in (plain / "rounds.jsonl").read_text()


def test_attack_success_is_the_share_of_stamped_images_of_other_classes():
    experiment = Experiment(make_config(CONFIG, {"attack": {"kind": "backdoor", "options": {"target": 2}}}), 0)
    x, y = experiment.dataset.test_x, experiment.dataset.test_y
    stamped = x[y != 2].clone()
    stamped[:, :, -2:, -2:] = 2.0
    want = (experiment.model_fn()(stamped).argmax(1) == 2).double().mean().item()
    assert Judge(experiment).attack_success(experiment.initial_arrays()) == pytest.approx(want)
    quiet = Experiment(make_config(CONFIG, {"attack": {"kind": "sign_flip"}}), 0)
    assert Judge(quiet).attack_success(quiet.initial_arrays()) is None


@pytest.mark.parametrize(
    ("attack", "error", "words"),
    [
        ({"kind": "sign_flp"}, UnknownName, "sign_flip"),
        ({"kind": "sign_flip", "options": {"scal": 1}}, UnknownName, "scale"),
        ({"kind": "sign_flip", "options": {"scale": 0}}, InvalidOption, "scale"),
        ({"kind": "sign_flip", "shares": 0.2}, UnknownName, "attack.share"),
        ({"kind": "sign_flip", "share": 1.2}, ConfigError, "attack.share"),
        ({"kind": "backdoor", "options": {"size": 0}}, InvalidOption, "size"),
        ({"share": 0.2}, ConfigError, "attack.kind"),
    ],
)
def test_mistakes_in_the_configuration(attack, error, words):
    with pytest.raises(error, match=words):
        make_config(CONFIG, {"attack": attack})


def test_a_backdoor_wants_images_larger_than_its_patch_and_a_class_that_exists():
    with pytest.raises(ConfigError, match="larger images"):
        Backdoor(size=4).stamped(images().train_x)
    with pytest.raises(ConfigError, match="class 7"):
        Backdoor(target=7).poisoned(images(), 5, np.random.default_rng(0))


@pytest.mark.study
def test_a_fifth_of_sign_flippers_ruins_the_mean_and_costs_robust_methods_three_points_at_most(tmp_path):
    given = load_config(Path(__file__).parents[3] / "simulations" / "hostile-digits.toml")
    robust = ["median", "trimmed_mean(trim=0.4)", "geometric_median", "krum(attackers=0.4,selected=12)"]

    def accuracy(method, share):
        rows = []
        settings = {"methods": [method], "attack": {"share": share}}
        assert not compare(make_config(given, settings), tmp_path / str(share), rows.append).failed
        return fmean(row["test_accuracy"] for row in rows if row["round"] == given["rounds"])

    clean = accuracy("fedavg", 0.0)
    assert accuracy("fedavg", 0.2) < 0.3
    for method in robust:
        assert accuracy(method, 0.2) > clean - 0.03, method
