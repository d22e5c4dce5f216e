"""What the documents tell people to type, typed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge import registry
from fedmerge.strategies import MergeStrategy

ROOT = Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
    """The Python examples of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_the_aggregator_of_the_contributing_guide_works_as_it_stands(monkeypatch):
    (source,) = blocks("CONTRIBUTING.md")
    code = [line for line in source.strip().splitlines() if line and not line.startswith(("from ", "import ", '"""'))]
    assert len(code) <= 10
    fedmerge.methods()  # what discovery registers must outlive this test
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    exec(compile(source, "contributing", "exec"), {"__name__": "contributing"})
    models = [nn.Linear(2, 1, bias=False) for _ in range(3)]
    for model, value in zip(models, (1.0, 2.0, 9.0), strict=True):
        nn.init.constant_(model.weight, value)
    assert torch.equal(fedmerge.merge(models, "midrange").weight, torch.full((1, 2), 5.0))
    assert MergeStrategy("midrange").pipeline.aggregator


def test_the_readmes_server_app_loads():
    app = next(source for source in blocks("README.md") if "ServerApp()" in source)
    scope = {"make_model": lambda: nn.Linear(1, 1)}
    exec(compile(app, "readme", "exec"), scope)
    assert scope["app"]
    assert len(app.strip().splitlines()) <= 12


def test_the_readme_names_every_method_and_no_other():
    table = (ROOT / "README.md").read_text().partition("## Methods")[2].partition("##")[0]
    named = set(re.findall(r"^\| `([a-z0-9_+]+)` \|", table, flags=re.MULTILINE))
    steps = {f"+{name}" for name in registry.entries("server step")}
    assert named == set(fedmerge.methods()) | steps


@pytest.mark.parametrize("name", ["demo.toml", "mnist-lenet.toml"])
def test_shipped_configurations_are_valid(name):
    from fedmerge.simulation import load_config, make_config

    assert make_config(load_config(ROOT / "simulations" / name)).methods


def test_importing_fedmerge_pulls_in_neither_flower_nor_ray_nor_matplotlib():
    code = (
        "import sys, fedmerge; fedmerge.methods(); print([m for m in sys.modules if m.split('.')[0] in sys.argv[1:]])"
    )
    heavy = ["flwr", "ray", "matplotlib", "torchvision", "sklearn", "flwr_datasets"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    import zipfile

    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fedmerge", "fedmerge-0.1.0.dist-info"}
    assert "fedmerge/py.typed" in names
    assert "fedmerge/aggregators/fednova.py" in names
