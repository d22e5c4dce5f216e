from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import random, sys
import numpy as np, torch
import fedmerge.data, fedmerge.data.example_sets
heavy = {"flwr", "ray", "matplotlib", "sklearn", "torchvision", "flwr_datasets", "datasets", "pandas"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)

def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

before = states()
digits = fedmerge.data.load_dataset("digits")
assert states() == before, "loading"
fedmerge.data.make_partition(digits, fedmerge.data.PartitionSettings(), seed=0)
assert states() == before, "partition"
assert not {"flwr", "ray"} & set(sys.modules)
"""


def test_fresh_interpreter_imports_nothing_heavy_and_draws_no_global_number():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""
