"""Minutes on real data: what the README promises of MNIST. Run with `make study`."""

from __future__ import annotations

import json
import os

import pytest

from fedmerge.simulation import compare, make_config

pytestmark = [
    pytest.mark.study,
    pytest.mark.skipif("FEDMERGE_DATA" not in os.environ, reason="FEDMERGE_DATA is not set: no real data files"),
]


def rows(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fedavg_passes_95_percent_in_ten_rounds_on_skewed_mnist(tmp_path, seed):
    config = make_config(
        {
            "methods": ["fedavg"],
            "seeds": [seed],
            "rounds": 10,
            "data": {"name": "mnist"},
            "model": {"name": "lenet"},
            "partition": {"clients": 20, "alpha": 0.1},
        }
    )
    (folder,) = compare(config, tmp_path, lambda row: None).runs
    assert max(row["test_accuracy"] for row in rows(folder)) > 0.95
