"""Data for the tests: digits always, real files where FEDMERGE_DATA says so, and small made-up sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedmerge.data import Dataset, load_dataset

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data files, or skip."""
    folder = os.environ.get("FEDMERGE_DATA")
    if not folder:
        pytest.skip("FEDMERGE_DATA is not set: no real data files")
    return Path(folder)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="session")
def mnist(real_data: Path) -> Dataset:
    if not (real_data / "MNIST" / "raw").is_dir():
        pytest.skip("no MNIST/raw in FEDMERGE_DATA")
    return load_dataset("mnist", real_data)


@pytest.fixture(scope="session")
def cifar10_dir(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 as torchvision wants it: in FEDMERGE_DATA, or unpacked from the pictures there."""
    if (real_data / "cifar-10-batches-py").is_dir():
        return real_data
    script = real_data / "unpack_cifar10.py"
    if not script.is_file():
        pytest.skip("no CIFAR-10 in FEDMERGE_DATA")
    target = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(script), str(target)], check=True, capture_output=True)
    return target


@pytest.fixture
def text_set() -> Dataset:
    """Ten windows of four tokens, by three natural clients with 5, 4 and 1 of them."""
    tokens = torch.arange(50).reshape(10, 5) % 7
    x, y = tokens[:, :-1], tokens[:, 1:]
    client = torch.tensor([0] * 5 + [1] * 4 + [2])
    return Dataset("text", x, y, x, y, 7, train_client=client, client_names=("first", "second", "third"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unpacking CIFAR-10 takes seconds, so whatever needs it is slow."""
    for item in items:
        if "cifar10_dir" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
