"""Reading a configuration: files and assignments become settings, which are checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedmerge.data.domains import make_domains
from fedmerge.data.sources import suggested_settings
from fedmerge.errors import ConfigError, RecordError, UnknownName
from fedmerge.lookup.kinds import METHOD_KINDS
from fedmerge.lookup.method_names import names_code, parse_value
from fedmerge.merging import build_pipeline, divided, method_parts, parts_beside
from fedmerge.observers.watch import check_names
from fedmerge.records.run_records import read_toml
from fedmerge.registry import build, entries, usual_names
from fedmerge.simulation.runs.config_keys import typed_error
from fedmerge.simulation.runs.config_model import Config
from fedmerge.simulation.runs.linearised_checks import check_linearised_methods
from fedmerge.simulation.runs.personal_checks import check_personal
from fedmerge.tasks.metric import metrics_of

__all__ = ["Config", "load_config", "make_config", "parse_assignment"]


def load_config(path: Path) -> dict[str, Any]:
    """Read a configuration file as nested settings, for :func:`make_config`.

    Raises
    ------
    ConfigError
        It cannot be read.
    """
    try:
        return read_toml(path)
    except RecordError as error:
        raise ConfigError(str(error)) from error


def make_config(*layers: Mapping[str, Any]) -> Config:
    """Check nested settings, later layers over earlier ones, all over what suits the data set.

    Raises
    ------
    UnknownName
        A key, method or option that does not exist; it names the nearest that does.
    ConfigError, InvalidOption
        A value of the wrong type or out of range.

    Examples
    --------
    >>> make_config({"rounds": 5}, {"training": {"epochs": 2}}).training.epochs
    2
    """
    given: dict[str, Any] = {}
    for layer in layers:
        given = _merged(given, layer)
    settings = _merged(_suggested(given), given)
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise typed_error(error, settings, Config) from error
    config = config.model_copy(update={"model": config.model.with_base_found()})
    _ = config.model.adapters
    _check_methods(config)
    check_personal(config)
    check_linearised_methods(config)
    check_names(config.observers)
    _ = config.data.every_option
    if not any(":" in domain.partition("(")[0] for domain in config.data.domains):  # one's own is imported when it runs
        make_domains(config.data.domains)
    if config.training.patience is not None and config.partition.held_out == 0:
        raise ConfigError(
            "training.patience judges by what clients hold out, and partition.held_out is 0: set it, such as to 0.1"
        )
    # What a configuration names is not run before somebody has agreed, and without a name the data set tells the task.
    if not config.task.code and (config.task.name or config.task.loss):
        _ = config.task.made()
    elif config.task.metrics is not None:
        _ = metrics_of(name for name in config.task.metrics if ":" not in name)
    if config.attack is not None and ":" not in config.attack.kind:  # one's own is imported when it runs
        _ = config.attack.attack
    return config


def parse_assignment(text: str) -> dict[str, Any]:
    """Nested settings from ``a.b=value``; the value is read as TOML, or else as text.

    Raises
    ------
    ConfigError
        There is no ``=``.

    Examples
    --------
    >>> parse_assignment("training.epochs=2")
    {'training': {'epochs': 2}}
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set wants key=value without blanks, such as --set training.epochs=2, got {text!r}")
    parsed = parse_value(value)
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    settings: dict[str, Any] = parsed
    return settings


def _suggested(given: Mapping[str, Any]) -> dict[str, Any]:
    """What suits the data set, for settings that are not given."""
    data = given.get("data")
    name = data.get("name") if isinstance(data, Mapping) else None
    suggested = dict(suggested_settings(name)) if isinstance(name, str) else {}
    if isinstance(data, Mapping) and (data.get("client") or _mapping(data.get("options")).get("client")):
        suggested["partition"] = {"scheme": "natural"}
    division = given.get("partition")
    if isinstance(division, Mapping) and {"scheme", "alpha", "column"} & set(division):
        suggested.pop("partition", None)  # who chooses a division gets it whole
    return suggested


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        known = result.get(key)
        result[key] = _merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return result


def _check_methods(config: Config) -> None:
    if not config.methods:
        raise ConfigError("methods is empty: name at least one, such as fedavg")
    for kind in ("methods", "seeds"):
        values = getattr(config, kind)
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise ConfigError(f"{kind} names {twice!r} twice: name each once")
    for method in config.methods:
        # What a configuration names is not imported before somebody has agreed.
        edits, first, others = divided(method_parts(method, config.options, load=False), method, load=False)
        if ":" in first.name:
            parts_beside(edits, others, method, load=False)
        else:
            settings: dict[str, Any] = {"privacy": config.privacy, "batch_norm": config.batch_norm}
            made = build_pipeline(method, config.options, load=False, trust=config.trust, **settings)
            if made.aggregator.local_rule is not None:
                made.aggregator.local_rule.check(config.training)
    known = {name: (kind, name) for kind in METHOD_KINDS for name in entries(kind)}
    known |= {usual: ("server step", name) for usual, name in usual_names().items()}
    for part, options in config.options.items():
        if ":" in part:
            continue
        if part not in known:
            raise UnknownName("method in options", part, known)
        kind, name = known[part]
        build(kind, name, {option: value for option, value in options.items() if not names_code(value)})
