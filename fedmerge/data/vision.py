"""MNIST, Fashion-MNIST and CIFAR-10: downloaded by torchvision, which also reads the last."""

from __future__ import annotations

import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmerge.data.dataset import Dataset
from fedmerge.data.extras import need
from fedmerge.data.idx import read_idx
from fedmerge.data.unpack import has_packed, unpack
from fedmerge.errors import DataError
from fedmerge.registry import register

__all__ = ["load_cifar10", "load_fashion_mnist", "load_mnist"]

_IDX_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")


class _Part(NamedTuple):
    """Images, uint8 ``[n, H, W]`` or ``[n, H, W, C]``, and the class of each."""

    images: Tensor | np.ndarray
    labels: Tensor | np.ndarray | list[int]


def _idx_part(root: Path, source: _Source, train: bool) -> _Part:
    """Read without torchvision, whose import takes longer than all of the reading."""
    images, labels = (root / source.folder / file for file in (_IDX_FILES[:2] if train else _IDX_FILES[2:]))
    return _Part(read_idx(images, axes=3), read_idx(labels, axes=1))


def _cifar_part(root: Path, source: _Source, train: bool) -> _Part:
    """The batches are pickles, which torchvision opens only where their checksums are the published ones."""
    batches = _reader(source)(root, train=train, download=False)
    return _Part(batches.data, batches.targets)


@dataclass(frozen=True)
class _Source:
    name: str
    torchvision_class: str
    folder: str
    files: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    read: Callable[[Path, _Source, bool], _Part]
    archive: str | None = None

    def expected(self, root: Path) -> str:
        packed = f"{self.archive} beside the folder" if self.archive else "the same with .gz"
        return f"{', '.join(self.files)} (or {packed}) in {root / self.folder}"


_DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MNIST = _Source("mnist", "MNIST", "MNIST/raw", _IDX_FILES, (0.1307,), (0.3081,), _DIGITS, _idx_part)
_FASHION = _Source(
    "fashion_mnist", "FashionMNIST", "FashionMNIST/raw", _IDX_FILES, (0.2860,), (0.3530,), _CLOTHES, _idx_part
)
_CIFAR10 = _Source(
    "cifar10",
    "CIFAR10",
    "cifar-10-batches-py",
    _CIFAR_FILES,
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
    _THINGS,
    _cifar_part,
    archive="cifar-10-python.tar.gz",
)


@register("mnist", kind="data set")
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


@register("fashion_mnist", kind="data set")
def load_fashion_mnist(data_dir: Path) -> Dataset:
    """Load Fashion-MNIST: as `load_mnist`, with the folder `FashionMNIST/raw/` and pieces of clothing.

    Examples
    --------
    >>> load_fashion_mnist(Path("data")).class_names[1]  # doctest: +SKIP
    'Trouser'
    """
    return _load(_FASHION, data_dir)


@register("cifar10", kind="data set")
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
    with _readable_root(source, data_dir) as root:
        train, test = _read(source, data_dir, root, True), _read(source, data_dir, root, False)
    return Dataset(
        name=source.name,
        train_x=_normalised(train.images, source),
        train_y=torch.as_tensor(train.labels, dtype=torch.int64),
        test_x=_normalised(test.images, source),
        test_y=torch.as_tensor(test.labels, dtype=torch.int64),
        num_classes=len(source.class_names),
        class_names=source.class_names,
    )


def _reader(source: _Source) -> Callable[..., Any]:
    reader: Callable[..., Any] = getattr(
        need("torchvision.datasets", f"data set {source.name!r}"), source.torchvision_class
    )
    return reader


@contextmanager
def _readable_root(source: _Source, data_dir: Path) -> Iterator[Path]:
    """A folder with all files unpacked: the user's own, or a temporary one."""
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
        _download(source, data_dir)
        yield data_dir


def _download(source: _Source, data_dir: Path) -> None:
    reader = _reader(source)
    try:
        reader(data_dir, download=True)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"data set {source.name!r} is not in {data_dir} and could not be downloaded to it ({reason}). "
            f"Expected {source.expected(data_dir)}. "
            "Point --data-dir or FEDMERGE_DATA at a folder that holds them, or connect to the network."
        ) from error


def _read(source: _Source, data_dir: Path, root: Path, train: bool) -> _Part:
    try:
        return source.read(root, source, train)
    except DataError:
        raise  # torchvision is missing
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
