"""Keys of a configuration: which there are, which one was meant, and what is wrong with the value of one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedmerge.errors import ConfigError, FedMergeError, UnknownName, shown
from fedmerge.training.local_training import USUAL_NAMES

__all__ = ["keys", "meant", "typed_error"]

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


def keys(kind: type) -> list[str]:
    """Every key, those of sections by ``section.key``: what pydantic's schema of the settings says.

    Examples
    --------
    >>> from fedmerge.data.partition_settings import PartitionSettings
    >>> keys(PartitionSettings)[:3]
    ['scheme', 'clients', 'alpha']
    """
    schema = TypeAdapter(kind).json_schema()
    return list(_keys(schema, schema.get("$defs", {}), ""))


def _keys(section: Mapping[str, Any], sections: Mapping[str, Any], path: str) -> Iterator[str]:
    for name, value in section.get("properties", {}).items():
        yield path + name
        # A section that may be left out is one of several possibilities, besides null.
        for one in (value, *value.get("anyOf", ()), *value.get("allOf", ())):
            if "$ref" in one:
                yield from _keys(sections[one["$ref"].rpartition("/")[2]], sections, f"{path}{name}.")


def meant(key: str, kind: type) -> str | None:
    """The key that people mean by another program's name for it, or by a name without its section.

    Examples
    --------
    >>> from fedmerge.simulation.runs.config_model import Config
    >>> meant("lr", Config), meant("training.batch-size", Config), meant("num_clients", Config)
    ('training.learning_rate', 'training.batch_size', 'partition.clients')
    """
    last = key.rpartition(".")[2].replace("-", "_").lower()
    last = _USUAL.get(last, last)
    known = keys(kind)
    values = [key for key in known if not any(other.startswith(f"{key}.") for other in known)]
    same_end = [key for key in values if key == last or key.endswith(f".{last}")]
    # A key of the same section that is spelt almost alike is likelier than one of another section.
    section = key.rpartition(".")[0]
    beside = [key for key in values if key.rpartition(".")[0] == section] if section else []
    near = difflib.get_close_matches(key, beside, 1, cutoff=0.9)
    return near[0] if near else min(same_end, key=lambda key: key.count("."), default=None)


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument", "invalid_key")
_SECTIONS = ("dataclass_type", "model_type", "model_attributes_type")


def typed_error(error: ValidationError, settings: Mapping[str, Any], kind: type) -> FedMergeError:
    """What pydantic finds wrong with settings, as an error of ours: a key that does not exist, or else all bad values.

    Parameters
    ----------
    error
        What it found.
    settings
        What it was given.
    kind
        The settings' model.

    Examples
    --------
    >>> from fedmerge.simulation.runs.config_model import Config
    >>> try:
    ...     Config.model_validate({"training": {"learning_rat": 0.1}})
    ... except ValidationError as error:
    ...     print(str(typed_error(error, {}, Config))[:89])
    unknown configuration key 'training.learning_rat'. Did you mean 'training.learning_rate'?
    """
    faults = error.errors()
    for fault in faults:
        if fault["type"] in _UNKNOWN:
            key = _dotted(fault["loc"])
            section = key.rpartition(".")[0]
            beside = [known for known in keys(kind) if known.rpartition(".")[0] == section]
            return UnknownName("configuration key", key, beside, guess=meant(key, kind))
    reasons: dict[str, list[str]] = {}  # a value that may be of several types has been tried as each of them
    for fault in faults:
        setting, words = _reason(fault, settings)
        reasons.setdefault(setting, []).append(words)
    return ConfigError("configuration: " + "; ".join(name + ", or ".join(words) for name, words in reasons.items()))


def _reason(fault: Any, settings: Mapping[str, Any]) -> tuple[str, str]:
    """The key with its value, and what to write instead where pydantic's words do not tell."""
    if fault["type"] in ("missing", "missing_argument"):
        return _dotted(fault["loc"]), " is missing here: give it a value"
    value, words, key = fault["input"], fault["msg"], _dotted(_given(fault["loc"], settings))
    if fault["type"] == "tuple_type":
        words = f"wants a list in brackets: {key} = [{json.dumps(value, default=str)}]"
        if isinstance(value, str) and value.startswith("["):  # a list that lost its quotes on the command line
            names = json.dumps([name.strip() for name in value.strip("[] ").split(",")])
            words = f"is no list, for a shell takes quotes away: write --set '{key}={names}'"
    elif fault["type"] in _SECTIONS:
        words = f"is a table of settings: set one of them, as {key}.NAME = VALUE"
    elif key == "target":
        words = "is an accuracy above 0 and at most 1: for 90 % write 0.9"
    return f"{key} = {shown(value)}: ", words


def _given(place: Sequence[int | str], settings: Any) -> list[int | str]:
    """The part of a place that somebody has written; pydantic adds the type that it tried, such as ``int``."""
    path: list[int | str] = []
    for step in place:
        try:
            settings = settings[step]
        except (KeyError, IndexError, TypeError):
            break
        path.append(step)
    return path or list(place)


def _dotted(place: Sequence[int | str]) -> str:
    return ".".join(map(str, place))
