"""Tensors of a model in files: a safetensors file, the index of one in several shards, or a run's checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fedmerge.errors import FedMergeError, InvalidOption, ModelError, UnknownName
from fedmerge.records.checkpoints import checkpoint_files, is_checkpoint, load_checkpoint
from fedmerge.state import State

__all__ = ["digest", "read_metadata", "read_state", "read_tensors", "renamed"]

INDEX = ".json"
"""Ending of an index, which names the shard of every tensor, as ``model.safetensors.index.json`` does."""


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a model's file, of all shards that an index names, or of the model in a run's checkpoint.

    Raises
    ------
    ModelError
        The file is missing, no safetensors, or empty; a shard is missing, or lacks a tensor that the index promises.
    RecordError
        It is a checkpoint that was damaged or edited.
    """
    if file.suffix == INDEX and not file.is_dir():
        return _read_shards(file)
    tensors = read_tensors(file, ModelError)
    if is_checkpoint(file):
        tensors = dict(load_checkpoint(file).section("state"))
    if not tensors:
        raise ModelError(f"{file} holds no tensors")
    return tensors


def read_tensors(file: Path, kind: type[FedMergeError]) -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Raises
    ------
    FedMergeError
        Of this kind, where the file cannot be read.
    """
    if file.is_dir():
        written = checkpoint_files(file) or checkpoint_files(file / "checkpoint")
        raise kind(
            f"{file} is a folder: name the file in it, such as {written[-1] if written else file / 'model.safetensors'}"
        )
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise kind(f"there is no file {file}") from error
    except OSError as error:
        raise kind(f"cannot read {file}: {error.strerror or error}") from error
    # A dtype that this torch lacks is no error of the format.
    except (SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise kind(
            f"{file} is no safetensors file ({error}); fedmerge reads no pickles: "
            "save a state_dict with safetensors.torch.save_file"
        ) from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    shard_of = _index(index)["weight_map"]
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(shard_of.values()):
        held = read_tensors(index.parent / shard, ModelError)
        promised = [name for name, home in shard_of.items() if home == shard]
        lacking = [name for name in promised if name not in held]
        if lacking:
            raise ModelError(
                f"{index.parent / shard} lacks {lacking[0]!r}, which {index.name} says is in it: fetch both files anew"
            )
        tensors |= {name: held[name] for name in promised}
    return tensors


def _index(file: Path) -> dict[str, Any]:
    """The content of an index, its map of tensors checked."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {file}") from error
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is no index of shards: it is not valid JSON ({error})") from error
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise ModelError(
            f'{file} is no index of shards: it must be {{"weight_map": {{TENSOR: FILE, ...}}}}, as in '
            "model.safetensors.index.json"
        )
    for name, shard in shard_of.items():
        # A shard lies beside its index: other paths would have a downloaded index read anything.
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise ModelError(f"{file}: the shard of {name!r} must be the name of a file beside it, got {shard!r}")
    return dict(content)


def read_metadata(file: Path) -> dict[str, str]:
    """What stands beside the tensors of a model's file, or of an index: texts by name.

    Raises
    ------
    ModelError
        The file cannot be read.
    """
    if file.suffix == INDEX:
        facts = _index(file).get("metadata")
        return {key: text for key, text in facts.items() if isinstance(text, str)} if isinstance(facts, dict) else {}
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error


def digest(file: Path) -> str:
    """SHA-256 of a model's file; of an index together with all its shards.

    Raises
    ------
    ModelError
        A file is missing.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> _ = file.write_bytes(b"abc")
    >>> digest(file)[:8]
    'ba7816bf'
    """
    files = [file]
    if file.suffix == INDEX:
        files += [file.parent / shard for shard in sorted(set(_index(file)["weight_map"].values()))]
    whole = hashlib.sha256()
    for part in files:
        try:
            with part.open("rb") as opened:
                hashed = hashlib.file_digest(opened, "sha256")
        except FileNotFoundError as error:
            raise ModelError(f"there is no file {part}") from error
        except OSError as error:
            raise ModelError(f"cannot read {part}: {error.strerror or error}") from error
        if len(files) == 1:
            return hashed.hexdigest()
        whole.update(hashed.digest())
    return whole.hexdigest()


def renamed(state: State, prefixes: Mapping[str, str], where: str) -> dict[str, Tensor]:
    """`state` with other beginnings of names: of the beginnings that fit a name the longest is replaced.

    Parameters
    ----------
    state
        Tensors by name.
    prefixes
        New beginnings by old ones: ``{"module.": ""}`` drops ``module.``, ``{"": "body."}`` puts ``body.`` in front.
    where
        Whose tensors they are, in front of an error.

    Raises
    ------
    UnknownName
        No name begins so.
    InvalidOption
        Two tensors would have one name.

    Examples
    --------
    >>> import torch
    >>> list(renamed({"module.fc.bias": torch.zeros(1), "step": torch.ones(1)}, {"module.": ""}, "file"))
    ['fc.bias', 'step']
    """
    for old in prefixes:
        if not any(name.startswith(old) for name in state):
            raise UnknownName(f"beginning of names in {where}:", old, list(state))
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        fitting = sorted((old for old in prefixes if name.startswith(old)), key=len)
        new = prefixes[fitting[-1]] + name.removeprefix(fitting[-1]) if fitting else name
        if new in tensors:
            raise InvalidOption(f"{where}: with prefix = {dict(prefixes)} two tensors are named {new!r}: change fewer")
        tensors[new] = tensor
    return tensors
