"""Files that are whole or not there: written under a temporary name, flushed to the disk, renamed; never pickled."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
from safetensors.torch import save
from torch import Tensor

from fedmerge.errors import RecordError, WriteError
from fedmerge.state import State

__all__ = [
    "append_line",
    "flush_folder",
    "pack_tensors",
    "read_toml",
    "write_atomically",
    "write_tensors",
    "write_toml",
    "writing",
]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` in the error where the disk is full, or something else keeps the block from writing.

    Raises
    ------
    WriteError
        It does.
    """
    try:
        yield
    except OSError as error:
        raise WriteError.because(path, error) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that nobody ever sees half of it.

    Raises
    ------
    WriteError
        It cannot be written; what stood there still stands, and no half is left beside it.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a rename may reach the disk before what it renames
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)  # it would go on filling the disk
            raise
        flush_folder(path.parent)


def append_line(path: Path, line: bytes) -> int:
    """Add a whole line to a file, or nothing of it; the file's length after it.

    Raises
    ------
    WriteError
        It cannot be written.
    """
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        left = memoryview(line + b"\n")
        try:
            while left:  # a disk that fills up takes a part
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise
        return file.tell()


def flush_folder(folder: Path) -> None:
    """Make new names in a folder outlast a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # some systems do not open folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_toml(path: Path, content: Mapping[str, Any]) -> None:
    """Write nested settings as TOML; what is None is left out, as TOML has no null."""
    write_atomically(path, tomli_w.dumps(_without_none(content)).encode())


def _without_none(content: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in content.items() if value is not None}
    return {key: _without_none(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    RecordError
        It is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of TOML or its characters, of endless numbers and nesting
        raise RecordError(f"{path} is not valid TOML: {error}; mend that line") from error


def write_tensors(path: Path, tensors: State, metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as one safetensors file."""
    write_atomically(path, pack_tensors(tensors, metadata))


def pack_tensors(tensors: State, metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a safetensors file with these tensors."""
    contiguous: dict[str, Tensor] = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    seen: set[int] = set()
    for name, tensor in contiguous.items():
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen:  # tied weights are one tensor, which the format wants twice
            contiguous[name] = tensor.clone()
        seen.add(pointer)
    return save(contiguous, dict(metadata or {}))
