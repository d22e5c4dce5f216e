"""Run records on disk: written whole or not at all, never pickled."""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedmerge.errors import RecordError
from fedmerge.state import State, prefixed, with_prefix

__all__ = ["RunRecord", "read_checkpoint", "read_toml", "write_atomically", "write_tensors", "write_toml"]

PARTIAL = ".partial"
"""Ending of the folder of a run that has not finished."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is not valid TOML: {error}; mend that line") from error


def write_tensors(path: Path, tensors: State, metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as one safetensors file."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in contiguous.items():
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen:  # tied weights are one tensor, which the format wants twice
            contiguous[name] = tensor.clone()
        seen.add(pointer)
    write_atomically(path, save(contiguous, dict(metadata or {})))


class RunRecord:
    """The folder of one run while it is written: ``<folder>.partial`` until it is complete.

    Parameters
    ----------
    folder
        Where the complete record will stand.
    config
        Everything resolved; running it again gives the same record.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.partial = folder.with_name(folder.name + PARTIAL)
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        write_toml(self.partial / "config.toml", config)

    def write_partition(self, tensors: State) -> None:
        """Keep who held which examples."""
        write_tensors(self.partial / "partition.safetensors", tensors)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one round to ``rounds.jsonl``, as a whole line; NaN and infinity become null."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        with (self.partial / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")

    def checkpoint(self, round: int, state: State, memory: State) -> None:
        """Keep the global model and the method's memory after `round`, in one file."""
        tensors = {**with_prefix("state", state), **with_prefix("memory", memory)}
        write_tensors(self.partial / "checkpoint" / "server.safetensors", tensors, {"round": str(round)})

    def finish(self) -> Path:
        """Put the complete record in its place; a record that stood there gives way only now."""
        old = self.folder.with_name(self.folder.name + ".old")
        if self.folder.exists():
            self.folder.rename(old)
        self.partial.rename(self.folder)
        if old.exists():
            shutil.rmtree(old)
        return self.folder


def read_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """Round, global model and method memory of a run's last checkpoint.

    Raises
    ------
    RecordError
        There is none, or it is damaged.
    """
    path = folder / "checkpoint" / "server.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            number = int((file.metadata() or {})["round"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RecordError(f"no usable checkpoint at {path}: {error}") from error
    return number, prefixed("state", tensors), prefixed("memory", tensors)
