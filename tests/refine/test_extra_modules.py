"""What masks and noise need installed, and what is imported where nobody asks for them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedmerge.errors import MissingExtra, NoAnswer
from fedmerge.refine import Privacy, epsilon
from fedmerge.simulation import make_config
from fedmerge.statistics import NoisySums

NOISE = NoisySums(clip=1.0, noise_multiplier=2.0)


@pytest.fixture
def without_opacus(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opacus", None)  # importing it raises ImportError


def test_what_noise_costs_is_refused_without_the_extra_that_reckons_it(without_opacus):
    with pytest.raises(MissingExtra, match=r"fedmerge\[privacy\]") as told:
        epsilon(1.0, 3, 1e-5)
    assert told.value.extra == "privacy"
    assert epsilon(1.0, 0, 1e-5) == 0.0  # nothing was asked, and nothing has to be reckoned


def test_masks_and_noise_themselves_need_no_extra(without_opacus):
    config = make_config({"methods": ["fedavg+ridge_head"], "privacy": {"masks": True}})
    assert config.privacy.masks
    privacy = Privacy(masks=True, noise=NOISE)
    privacy.check_clients(3)
    with pytest.raises(NoAnswer, match="2 are needed"):  # asking works so far that it counts the clients
        privacy.protected(lambda questions, clients: [])([], [0])


def test_simulated_masks_are_imported_only_for_who_asks_for_them():
    code = (
        "import sys, fedmerge.simulation; from fedmerge.refine import Privacy; Privacy().protected(print); "
        "print('fedmerge.privacy.simulated_masks' in sys.modules, 'opacus' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "False"]
