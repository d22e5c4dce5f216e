from __future__ import annotations

import gzip
import tarfile

import numpy as np
import pytest
import torch

from fedmerge.data import load_dataset
from fedmerge.errors import DataError

FOLDERS = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}
PARTS = {"train": 30, "t10k": 12}


def idx(array):
    """An array in the format of the MNIST files: magic number, sizes, bytes."""
    header = [8 << 8 | array.ndim, *array.shape]
    return b"".join(number.to_bytes(4, "big") for number in header) + array.tobytes()


def write_idx(root, name, packed=True):
    """Small files in the place of the real ones; returns the images and labels written."""
    generator = np.random.default_rng(0)
    folder = root / FOLDERS[name]
    folder.mkdir(parents=True)
    written = {}
    for part, count in PARTS.items():
        images = generator.integers(0, 256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in {"images-idx3": images, "labels-idx1": labels}.items():
            path = folder / f"{part}-{kind}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))
        written[part] = images, labels
    return written


def contents(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


@pytest.fixture
def no_network(monkeypatch):
    """Downloads go to a port of this machine where nobody listens."""
    from torchvision import datasets

    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("packed", [True, False])
def test_local_files_are_read_without_network_and_left_alone(name, packed, tmp_path, no_network):
    written = write_idx(tmp_path, name, packed)
    before = contents(tmp_path)
    data = load_dataset(name, tmp_path)
    assert contents(tmp_path) == before
    mean, std = {"mnist": (0.1307, 0.3081), "fashion_mnist": (0.2860, 0.3530)}[name]
    for x, y, part in ((data.train_x, data.train_y, "train"), (data.test_x, data.test_y, "t10k")):
        images, labels = written[part]
        expected = (torch.from_numpy(images).double() / 255 - mean) / std
        torch.testing.assert_close(x, expected.float().unsqueeze(1), atol=1e-5, rtol=1e-5)
        assert y.tolist() == labels.tolist()
    assert data.train_x.is_contiguous()


def test_plain_and_packed_files_may_be_mixed(tmp_path, no_network):
    write_idx(tmp_path, "mnist")
    packed = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    before = contents(tmp_path)
    assert len(load_dataset("mnist", tmp_path).test_y) == PARTS["t10k"]
    assert contents(tmp_path) == before


def test_scratch_copies_are_removed(tmp_path, no_network, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    write_idx(tmp_path / "data", "mnist")
    load_dataset("mnist", tmp_path / "data")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist", "train-images-idx3-ubyte.*MNIST/raw"),
        ("fashion_mnist", "t10k-labels-idx1-ubyte.*FashionMNIST/raw"),
        ("cifar10", r"data_batch_1.*cifar-10-python\.tar\.gz.*cifar-10-batches-py"),
    ],
)
def test_failed_download_says_what_was_expected_where(name, expected, tmp_path, no_network):
    with pytest.raises(DataError, match=expected) as caught:
        load_dataset(name, tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "--data-dir or FEDMERGE_DATA" in message
    assert "network" in message


def test_missing_file_among_packed_ones(tmp_path, no_network):
    write_idx(tmp_path, "mnist")
    (tmp_path / "MNIST/raw/train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="could not be downloaded"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"no gzip at all"])
def test_damaged_gz(damage, tmp_path, no_network):
    write_idx(tmp_path, "mnist")
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"'mnist'.*damaged"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-10], lambda raw: b"", lambda raw: bytes(200)])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_plain_file(damage, file, tmp_path, no_network):
    write_idx(tmp_path, "mnist", packed=False)
    path = tmp_path / "MNIST/raw" / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"'mnist'.*damaged"):
        load_dataset("mnist", tmp_path)


def test_labels_of_another_file(tmp_path, no_network):
    write_idx(tmp_path, "mnist", packed=False)
    folder = tmp_path / "MNIST/raw"
    (folder / "train-labels-idx1-ubyte").write_bytes((folder / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(DataError, match=r"training part: inputs have shape \[30, 1, 28, 28\], labels \[12\]"):
        load_dataset("mnist", tmp_path)


def test_damaged_cifar_batch(tmp_path, no_network):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / file).write_bytes(b"not a batch")
    with pytest.raises(DataError, match=r"'cifar10'.*damaged"):
        load_dataset("cifar10", tmp_path)


def test_damaged_cifar_archive(tmp_path, no_network):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(DataError, match=r"'cifar10'.*damaged"):
        load_dataset("cifar10", tmp_path)


def test_real_mnist(mnist):
    assert mnist.train_x.shape == (60_000, 1, 28, 28)
    assert torch.bincount(mnist.train_y).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert torch.bincount(mnist.test_y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert abs(mnist.train_x.mean()) < 1e-3
    assert abs(mnist.train_x.std() - 1) < 1e-3


def test_real_fashion_mnist(real_data):
    data = load_dataset("fashion_mnist", real_data)
    assert torch.bincount(data.train_y).tolist() == [6000] * 10
    assert torch.bincount(data.test_y).tolist() == [1000] * 10
    assert abs(data.train_x.mean()) < 1e-3
    assert data.class_names[9] == "Ankle boot"


def test_real_cifar10(cifar10_dir, no_network):
    data = load_dataset("cifar10", cifar10_dir)
    assert data.train_x.shape == (50_000, 3, 32, 32)
    assert data.test_x.shape == (10_000, 3, 32, 32)
    assert torch.bincount(data.train_y).tolist() == [5000] * 10
    assert data.class_names[0] == "airplane"
    assert data.train_x.is_contiguous()
    means, stds = data.train_x.mean(dim=(0, 2, 3)), data.train_x.std(dim=(0, 2, 3))
    torch.testing.assert_close(means, torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(stds, torch.ones(3), atol=2e-3, rtol=0)


def test_cifar10_from_its_archive(cifar10_dir, tmp_path, no_network):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(cifar10_dir / "cifar-10-batches-py", arcname="cifar-10-batches-py")
    data = load_dataset("cifar10", tmp_path)
    assert len(data.train_y) == 50_000
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]
