"""Keys of a configuration: which there are, and which one was meant."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel

from fedmerge.errors import UnknownName
from fedmerge.training.usual_names import USUAL_NAMES

__all__ = ["check_keys", "keys", "meant"]

# What other programs call them, besides the names of training settings.
_USUAL = USUAL_NAMES | {
    "data": "data.name",
    "data_set": "data.name",
    "dataset": "data.name",
    "data_dir": "data.dir",
    "callbacks": "observers",
    "gpu": "device",
    "method": "methods",
    "n_clients": "clients",
    "num_clients": "clients",
    "num_rounds": "rounds",
    "num_seeds": "seeds",
    "num_workers": "workers",
    "seed": "seeds",
    "strategy": "methods",
}


def keys(kind: type, path: str = "") -> Iterator[str]:
    """Every key, those of sections by ``section.key``.

    Examples
    --------
    >>> from fedmerge.data.partition_settings import PartitionSettings
    >>> list(keys(PartitionSettings))[:3]
    ['scheme', 'clients', 'alpha']
    """
    for name, hint in _hints(kind).items():
        yield path + name
        section = _section(hint)
        if section is not None:
            yield from keys(section, f"{path}{name}.")


def meant(key: str, kind: type) -> str | None:
    """The key that people mean by another program's name for it, or by a name without its section.

    Examples
    --------
    >>> from fedmerge.simulation.runs.config import Config
    >>> meant("lr", Config), meant("training.batch-size", Config), meant("num_clients", Config)
    ('training.learning_rate', 'training.batch_size', 'partition.clients')
    """
    last = key.rpartition(".")[2].replace("-", "_").lower()
    last = _USUAL.get(last, last)
    known = list(keys(kind))
    values = [one for one in known if not any(other.startswith(f"{one}.") for other in known)]
    found = [one for one in values if one == last or one.endswith(f".{last}")]
    # A key of the same section that is spelt almost alike is likelier than one of another section.
    section = key.rpartition(".")[0]
    beside = [one for one in values if one.rpartition(".")[0] == section] if section else []
    near = difflib.get_close_matches(key, beside, 1, cutoff=0.9)
    return near[0] if near else min(found, key=lambda one: one.count("."), default=None)


def check_keys(settings: Mapping[str, Any], kind: type) -> None:
    """Make sure that every key is known.

    Raises
    ------
    UnknownName
        One is not; the error names the key that was meant, or the nearest.
    """
    _check(settings, kind, "", kind)


def _check(settings: Mapping[str, Any], kind: type, path: str, whole: type) -> None:
    hints = _hints(kind)
    for key, value in settings.items():
        if key not in hints:
            known = [path + name for name in hints]
            raise UnknownName("configuration key", path + key, known, guess=meant(path + key, whole))
        section = _section(hints[key])
        if section is not None and isinstance(value, Mapping):
            _check(value, section, f"{path}{key}.", whole)


def _hints(kind: Any) -> dict[str, Any]:
    names = kind.model_fields if issubclass(kind, BaseModel) else [field.name for field in dataclasses.fields(kind)]
    hints = get_type_hints(kind)
    return {name: hints[name] for name in names}


def _section(hint: Any) -> type | None:
    candidates = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in candidates:
        if isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)):
            return kind
    return None
