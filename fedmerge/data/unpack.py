"""Unpack the compressed files of a data set into another folder, leaving theirs as it is."""

from __future__ import annotations

import gzip
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["MOST_BYTES", "has_packed", "unpack"]

MOST_BYTES = 1 << 28
"""Largest file that is unpacked: the largest of these data sets has 47 MB, so more is a bomb or another file."""


def has_packed(root: Path, folder: str, files: Iterable[str], archive: str | None) -> bool:
    """Whether `root` holds the archive, or each file of its subfolder plain or with .gz.

    Examples
    --------
    >>> has_packed(Path("nowhere"), "MNIST/raw", ["labels"], archive=None)
    False
    """
    if archive is not None:
        return (root / archive).is_file()
    return all((root / folder / name).is_file() or _gz(root / folder / name).is_file() for name in files)


def unpack(root: Path, folder: str, files: Iterable[str], archive: str | None, target: Path) -> None:
    """Write the files that `has_packed` found below `root` to the same subfolder of `target`.

    Raises
    ------
    OSError, EOFError, zlib.error, tarfile.TarError
        Where a file is damaged or larger than any of a data set, or `target` cannot be written.
    """
    if archive is not None:
        with tarfile.open(root / archive) as packed:
            for name in files:  # and nothing else that may be in it
                member = packed.getmember(f"{folder}/{name}") if f"{folder}/{name}" in packed.getnames() else None
                if member is None or not member.isreg():
                    raise tarfile.TarError(f"{archive} holds no file {folder}/{name}")
                if member.size > MOST_BYTES:
                    raise tarfile.TarError(f"{folder}/{name} would take {member.size} bytes")
                packed.extract(member, target, filter="data")
        return
    (target / folder).mkdir(parents=True)
    for name in files:
        plain = root / folder / name
        if plain.is_file():
            shutil.copyfile(plain, target / folder / name)
            continue
        with gzip.open(_gz(plain), "rb") as source, (target / folder / name).open("wb") as copy:
            left = MOST_BYTES
            while piece := source.read(1 << 20):
                left -= len(piece)
                if left < 0:
                    raise OSError(f"{name}.gz holds more than {MOST_BYTES} bytes")
                copy.write(piece)


def _gz(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")
