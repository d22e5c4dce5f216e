"""MNIST, Fashion-MNIST and CIFAR-10, read by torchvision."""

from __future__ import annotations

import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.data.dataset import Dataset
from fedmerge.data.extras import need
from fedmerge.data.unpack import has_packed, unpack
from fedmerge.errors import DataError

__all__ = ["load_cifar10", "load_fashion_mnist", "load_mnist"]

_IDX_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")


@dataclass(frozen=True)
class _Source:
    name: str
    torchvision_class: str
    folder: str
    files: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    archive: str | None = None

    def expected(self, root: Path) -> str:
        packed = f"{self.archive} beside the folder" if self.archive else "the same with .gz"
        return f"{', '.join(self.files)} (or {packed}) in {root / self.folder}"


_MNIST = _Source("mnist", "MNIST", "MNIST/raw", _IDX_FILES, (0.1307,), (0.3081,))
_FASHION = _Source("fashion_mnist", "FashionMNIST", "FashionMNIST/raw", _IDX_FILES, (0.2860,), (0.3530,))
_CIFAR10 = _Source(
    "cifar10",
    "CIFAR10",
    "cifar-10-batches-py",
    _CIFAR_FILES,
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
    archive="cifar-10-python.tar.gz",
)


def load_mnist(data_dir: Path) -> Dataset:
    """Load MNIST: 60,000 + 10,000 digits `[n, 1, 28, 28]`, 10 classes.

    Parameters
    ----------
    data_dir : Path
        Holds `MNIST/raw/`, plain or with the original .gz files, which are then unpacked elsewhere for
        the moment and never beside them. Where files are missing, they are downloaded to it.

    Raises
    ------
    DataError
        Where files are damaged, or missing and not to be downloaded, or torchvision is not installed.

    Examples
    --------
    >>> load_mnist(Path("data")).input_shape  # doctest: +SKIP
    (1, 28, 28)
    """
    return _load(_MNIST, data_dir)


def load_fashion_mnist(data_dir: Path) -> Dataset:
    """Load Fashion-MNIST: as `load_mnist`, with the folder `FashionMNIST/raw/` and pieces of clothing.

    Examples
    --------
    >>> load_fashion_mnist(Path("data")).class_names[1]  # doctest: +SKIP
    'Trouser'
    """
    return _load(_FASHION, data_dir)


def load_cifar10(data_dir: Path) -> Dataset:
    """Load CIFAR-10: 50,000 + 10,000 images `[n, 3, 32, 32]`, 10 classes; 0.7 GB as float32.

    As `load_mnist`, with the folder `cifar-10-batches-py/` or the archive `cifar-10-python.tar.gz`.

    Examples
    --------
    >>> load_cifar10(Path("data")).input_shape  # doctest: +SKIP
    (3, 32, 32)
    """
    return _load(_CIFAR10, data_dir)


def _load(source: _Source, data_dir: Path) -> Dataset:
    reader = getattr(need("torchvision.datasets", f"data set {source.name!r}"), source.torchvision_class)
    with _readable_root(source, data_dir, reader) as root:
        train, test = _read(source, data_dir, root, reader, True), _read(source, data_dir, root, reader, False)
    return Dataset(
        name=source.name,
        train_x=_normalised(train.data, source),
        train_y=torch.as_tensor(train.targets, dtype=torch.int64),
        test_x=_normalised(test.data, source),
        test_y=torch.as_tensor(test.targets, dtype=torch.int64),
        num_classes=len(train.classes),
        class_names=tuple(train.classes),
    )


@contextmanager
def _readable_root(source: _Source, data_dir: Path, reader: Any) -> Iterator[Path]:
    """A folder from which torchvision can read: the user's own, or a temporary one with its files unpacked."""
    if all((data_dir / source.folder / file).is_file() for file in source.files):
        yield data_dir
    elif has_packed(data_dir, source.folder, source.files, source.archive):
        with tempfile.TemporaryDirectory(prefix="fedmerge-") as scratch:
            try:
                unpack(data_dir, source.folder, source.files, source.archive, Path(scratch))
            except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
                raise _damaged(source, data_dir, error) from error
            yield Path(scratch)
    else:
        _download(source, data_dir, reader)
        yield data_dir


def _download(source: _Source, data_dir: Path, reader: Any) -> None:
    try:
        reader(data_dir, download=True)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"data set {source.name!r} is not in {data_dir} and could not be downloaded to it ({reason}). "
            f"Expected {source.expected(data_dir)}. "
            "Point --data-dir or FEDMERGE_DATA at a folder that holds them, or connect to the network."
        ) from error


def _read(source: _Source, data_dir: Path, root: Path, reader: Any, train: bool) -> Any:
    try:
        return reader(root, train=train, download=False)
    # torchvision has no error of its own for a damaged file: it fails wherever the parsing stops.
    except Exception as error:
        raise _damaged(source, data_dir, error) from error


def _damaged(source: _Source, data_dir: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"data set {source.name!r}: the files below {data_dir} are damaged ({reason}). "
        f"Delete them to have them downloaded again, or copy them anew: {source.expected(data_dir)}."
    )


def _normalised(images: Tensor | np.ndarray, source: _Source) -> Tensor:
    """Normalised float32 `[n, C, H, W]` of uint8 `[n, H, W]` or `[n, H, W, C]`; one float copy, no more."""
    pixels = torch.as_tensor(images)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    x = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    shape = (1, len(source.mean), 1, 1)
    x.sub_(torch.tensor(source.mean).mul(255).view(shape))
    return x.div_(torch.tensor(source.std).mul(255).view(shape))
