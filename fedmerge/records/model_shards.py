"""A model in several safetensors files, with an index that says which tensor is where."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from fedmerge.errors import ConfigError, RecordError
from fedmerge.records.atomic_files import write_atomically, write_tensors
from fedmerge.state import State

__all__ = ["INDEX_END", "byte_size", "write_shards"]

INDEX_END = ".safetensors.index.json"
"""How the name of an index ends, beside shards such as ``model-00001-of-00002.safetensors``."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def byte_size(text: str, option: str) -> int:
    """A size in bytes, such as ``5GB`` (10^9 bytes each) or ``512MiB`` (2^20); `option` is where it was given.

    Raises
    ------
    ConfigError
        It is no size above 0.

    Examples
    --------
    >>> byte_size("1.5 MB", "--max-shard-size")
    1500000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = 0 if match is None else int(float(match[1]) * _UNITS.get(match[2].upper(), 0))
    if size < 1:
        raise ConfigError(f"{option} wants a size such as 5GB, 500MB or 512MiB, got {text!r}")
    return size


def write_shards(path: Path, tensors: State, most: int, metadata: Mapping[str, str] | None = None) -> Path:
    """Write named tensors into files of at most so many bytes of tensors each; a larger tensor has one for itself.

    Parameters
    ----------
    path
        ``NAME.safetensors``, written as one file where all fit into one; or the index, ``NAME.safetensors.index.json``,
        which is written in any case.
    tensors
        Kept in their order.
    most
        Bytes, at least 1.
    metadata
        Texts that stand beside the tensors in each file, and in the index.

    Returns
    -------
    Path
        The file, or the index: what one has to name to read the model. It is written last, so that it never names
        shards that are not there.

    Raises
    ------
    RecordError
        `path` has another ending.
    """
    indexed = path.name.endswith(INDEX_END)
    stem = path.name.removesuffix(INDEX_END) if indexed else path.name.removesuffix(".safetensors")
    if not stem or not (indexed or path.suffix == ".safetensors"):
        raise RecordError(f"{path}: a model in shards is written as NAME.safetensors or NAME{INDEX_END}")
    shards: list[dict[str, None]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > most:
            shards.append({})
            filled = 0
        shards[-1][name] = None
        filled += tensor.nbytes
    if len(shards) == 1 and not indexed:
        write_tensors(path, tensors, metadata)
        return path
    home: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        shard = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(path.parent / shard, {name: tensors[name] for name in names}, metadata)
        home |= dict.fromkeys(names, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total, **(metadata or {})}, "weight_map": home}
    target = path if indexed else path.parent / f"{stem}{INDEX_END}"
    write_atomically(target, json.dumps(index, indent=2).encode())
    return target
