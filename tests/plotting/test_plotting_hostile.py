from __future__ import annotations

import pytest

from fedmerge.errors import RecordError
from fedmerge.plotting import plot_hostile
from fedmerge.plotting.hostile_grid import Outcome, outcomes


def attacked(write_run, kind, share, method, seed, accuracy, success=None):
    folder = write_run(method, seed, [0.1, accuracy], out=f"{kind}-{share}", attack_success=success)
    (folder / "config.toml").write_text(f'[attack]\nkind = "{kind}"\nshare = {share}\n')
    return folder.parent


def test_ends_are_read_with_their_attack_and_share(write_run):
    one = attacked(write_run, "sign_flip", 0.2, "fedavg", 0, 0.5)
    two = attacked(write_run, "backdoor", 0.1, "median", 1, 0.75, success=0.25)
    assert outcomes([one, two]) == [
        Outcome("sign_flip", "test_accuracy", "fedavg", 0.2, 50.0),
        Outcome("backdoor", "test_accuracy", "median", 0.1, 75.0),
        Outcome("backdoor", "attack_success", "median", 0.1, 25.0),
    ]


def test_a_panel_for_each_attack_and_measure(write_run, tmp_path):
    folders = []
    for share in (0.0, 0.2):
        for method in ("fedavg", "median"):
            for seed in (0, 1):
                folders.append(attacked(write_run, "sign_flip", share, method, seed, 0.9))
                folders.append(attacked(write_run, "backdoor", share, method, seed, 0.9, success=share))
    text = plot_hostile(list(dict.fromkeys(folders)), tmp_path / "hostile.svg").read_text()
    assert text.count("share of attackers (%)") == 3
    assert text.count("attack success (%)") == 1
    assert "sign flip" in text


def test_mistakes(write_run, out, tmp_path):
    write_run("fedavg", 0, [0.1, 0.6])
    with pytest.raises(RecordError, match="names no attack"):
        plot_hostile([out], tmp_path)
    with pytest.raises(RecordError, match="no run to draw"):
        plot_hostile([], tmp_path)
