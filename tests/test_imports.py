"""What ``import fedmerge`` brings along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = {"flwr", "ray", "matplotlib", "torchvision", "sklearn", "flwr_datasets", "datasets", "typer"}


def test_the_core_imports_nothing_of_deployment_simulation_or_plotting():
    code = (
        "import sys, fedmerge, fedmerge.training, fedmerge.merging; fedmerge.methods(); "
        f"print(sorted({HEAVY} & set(sys.modules)), fedmerge.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[] ")


def test_no_helper_of_the_tests_hides_a_module_of_pythons():
    """Folders of tests are on the path of processes that tests start, in front of Python's own modules."""
    tests = Path(__file__).parent
    assert [str(file) for file in tests.rglob("*.py") if file.stem in sys.stdlib_module_names] == []
