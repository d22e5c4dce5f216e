"""Configuration of a comparison: one TOML file, checked before anything runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmerge.lookup.kinds import METHOD_KINDS
from fedmerge.layout import BatchNormPolicy
from fedmerge.data.partition_settings import PartitionSettings
from fedmerge.data.sources import suggested_settings
from fedmerge.data.table import ENDINGS, is_table
from fedmerge.errors import ConfigError, RecordError, UnknownName, shown
from fedmerge.lookup.method_names import own_strategy, parse_value
from fedmerge.models import model_options
from fedmerge.observers.watch import check_names
from fedmerge.merging import build_pipeline, divided, method_parts
from fedmerge.questions import Trust
from fedmerge.records.run_records import read_toml
from fedmerge.refine import Privacy
from fedmerge.registry import build, entries, usual_names
from fedmerge.simulation.scenarios.attacks import Attack
from fedmerge.simulation.runs.config_keys import check_keys
from fedmerge.simulation.scenarios.faults import Faults
from fedmerge.simulation.runs.personal_checks import check_personal
from fedmerge.statistics import StatisticsSettings
from fedmerge.tasks import Classification, Task, make_task
from fedmerge.training.local import LocalTraining

__all__ = [
    "AttackSettings",
    "Config",
    "DataSettings",
    "ModelSettings",
    "TaskSettings",
    "load_config",
    "make_config",
    "parse_assignment",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Section):
    """Which data set, and where it lies: a name, a table's file, or ``module:function``.

    ``label`` is a table's column to predict, ``client`` its column of clients; ``options`` are what
    :func:`~fedmerge.data.table.load_table` takes besides, or the function.
    """

    name: str = "digits"
    dir: Path | None = None
    label: str | None = None
    client: str | None = None
    options: dict[str, Any] = {}

    @property
    def every_option(self) -> dict[str, Any]:
        """What the data set is loaded with.

        Raises
        ------
        ConfigError
            A column is named for what is no table.
        """
        columns = {key: value for key in ("label", "client") if (value := getattr(self, key)) is not None}
        if columns and self.name != "table" and not is_table(self.name):
            raise ConfigError(
                f"data.{next(iter(columns))} names a column of a table, and data.name = {self.name!r} is none: leave "
                f"it out, or name a file that ends in {', '.join(ENDINGS)}"
            )
        return {**self.options, **columns}


class ModelSettings(_Section):
    """Which model: a name or ``module:factory``, and its widths.

    With ``apart``, clients start the first round from an initialisation of their own; with ``variants`` also at
    widths of their own, client i having the options ``variants[i % len(variants)]`` over the common ones. ``frozen``
    are patterns of parameters that nobody trains, such as ``["features.*"]``: they are not sent.
    """

    name: str = "mlp"
    options: dict[str, Any] = {}
    apart: bool = False
    variants: tuple[dict[str, Any], ...] = ()
    frozen: tuple[str, ...] = ()


class TaskSettings(_Section):
    """What the model is asked to do, and by what it is judged: a registered task, ``module:Task``, or a loss.

    By default it is what the data set is made for, and classification where that is not said.

    ``loss`` is ``module:function`` of outputs and targets, such as ``torch.nn.functional:huber_loss``. In place of a
    name it is all that is known; beside one clients train with it, and models are judged as the task that is named.
    ``metrics`` are names and ``module:function``, those that are usual for the task where not given.
    """

    name: str | None = None
    loss: str | None = None
    metrics: tuple[str, ...] | None = None
    options: dict[str, Any] = {}

    def made(self, usual: str = "") -> Task | None:
        """The task, its options checked; None for plain classification, whose class axis is then read from shapes.

        `usual` is what the data set is made for, where the configuration names no task.
        """
        name = self.name or (None if self.loss else usual or None)
        made = make_task(name, self.options, loss=self.loss, metrics=self.metrics)
        return None if made == Classification() and not made.measured else made

    @property
    def code(self) -> tuple[str, ...]:
        """Names of what would be imported."""
        named = (self.name, self.loss, *(self.metrics or ()))
        torchs = ("torch.nn:", "torch.nn.functional:")
        return tuple(name for name in named if name is not None and ":" in name and not name.startswith(torchs))


class AttackSettings(_Section):
    """What a share of the clients, chosen by the seed, does to the others.

    ``kind`` is ``label_flip``, ``sign_flip``, ``scaled_update``, ``gaussian_noise`` or ``backdoor``, or one's own,
    ``module:Attack``; ``options`` are the fields of that class, see :mod:`fedmerge.simulation.scenarios.attacks`.
    """

    kind: str
    share: Annotated[float, Field(ge=0, le=1)] = 0.2
    options: dict[str, Any] = {}

    @property
    def attack(self) -> Attack:
        """The behaviour, its options checked."""
        made: Attack = build("attack", self.kind, self.options)
        return made


class Config(_Section):
    """Everything that a comparison depends on.

    ``methods`` may hold names of :func:`fedmerge.methods`, with server steps added by ``+`` and options in
    parentheses (``fedfisher(variant=diag)``), and ``module:Strategy`` for any Flower strategy; ``options`` has
    a table per part. ``references`` also judges the clients' own models of the first round, their ensemble
    and the best alone. ``server_examples`` gives the server so many examples of the test set, for methods that use
    data there; the rest is the test set then. ``statistics`` says how clients measure what methods need; ``privacy``
    masks and noise for what they answer to refinements (they then keep training losses and evaluations to themselves),
    ``trust`` how far single clients are believed there.
    With ``attack`` some clients are hostile; with ``faults`` they crash, send nonsense, disappear or are late.

    ``personal`` are patterns of tensors that stay with the clients, such as ``["head.*"]``, see
    :class:`~fedmerge.layout.Layout`: each client is then judged with its own, and ``test_loss`` and ``test_accuracy``
    are means over the clients' own models on their held-out examples.

    ``on_client_error``, ``on_too_few``, ``min_clients`` and ``round_timeout`` say what becomes of a round then, see
    :class:`~fedmerge.strategies.MergeStrategy`. Virtual clients share a machine, so each may compute by itself for
    ``round_timeout`` seconds: on Ray one that takes longer is cut off.
    ``workers``, ``threads`` and ``engine`` change how fast it runs, not what comes out. ``keep_checkpoints`` is how
    many of the last checkpoints of a run stay, for ``fedmerge resume``. ``observers`` are names, with options in
    parentheses, or ``module:Observer``; see :mod:`fedmerge.observers`.
    """

    methods: tuple[str, ...] = ("fedavg", "fednova", "fedatt")
    options: dict[str, dict[str, Any]] = {}
    rounds: Annotated[int, Field(ge=1)] = 10
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    data: DataSettings = DataSettings()
    partition: PartitionSettings = PartitionSettings()
    model: ModelSettings = ModelSettings()
    task: TaskSettings = TaskSettings()
    training: LocalTraining = LocalTraining()
    personal: tuple[str, ...] = ()
    fraction_train: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_norm: BatchNormPolicy = "mean"
    on_bad_update: Literal["drop", "raise"] = "drop"
    on_client_error: Literal["skip", "raise"] = "skip"
    on_too_few: Literal["raise", "skip"] = "raise"
    min_clients: Annotated[int, Field(ge=1)] = 1
    round_timeout: Annotated[float, Field(gt=0)] | None = None
    evaluate_clients: bool = True
    statistics: StatisticsSettings = StatisticsSettings()
    privacy: Privacy = Privacy()
    trust: Trust = Trust()
    attack: AttackSettings | None = None
    faults: Faults | None = None
    target: Annotated[float, Field(gt=0, le=1)] | None = None
    references: bool = False
    server_examples: Annotated[int, Field(ge=0)] = 0
    workers: int | str = "auto"
    device: str = "auto"
    threads: Annotated[int, Field(ge=1)] = 1
    engine: Literal["auto", "serial", "stacked"] = "auto"
    keep_checkpoints: Annotated[int, Field(ge=1)] = 3
    observers: tuple[str, ...] = ()

    @property
    def local_training(self) -> LocalTraining:
        """How clients train, with the number of rounds, by which some schedules go."""
        known = self.training.total_rounds or self.rounds
        return dataclasses.replace(self.training, total_rounds=known)

    def resolved(self, method: str, seed: int) -> dict[str, Any]:
        """The configuration of one run, every default written out; loading it gives that run again."""
        settings = self.model_dump(mode="json")
        settings["methods"], settings["seeds"] = [method], [seed]
        settings["options"] = _resolved_options(method, self.options)
        settings["model"]["options"] = {**_known_defaults(self.model.name), **settings["model"]["options"]}
        if self.attack is not None:
            settings["attack"]["options"] = dataclasses.asdict(self.attack.attack)  # type: ignore[call-overload]
        return settings


def _resolved_options(method: str, options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    named = own_strategy(method)
    if named is not None:
        return {named.name: dict(options[named.name])} if named.name in options else {}
    pipeline = build_pipeline(method, options)
    edits, first, others = divided(method_parts(method, options), method)
    made: dict[type, list[Any]] = {}
    for part in (*pipeline.edits, *pipeline.server_steps, *pipeline.refinements):
        made.setdefault(type(part), []).append(part)
    known = {name: part for kind in METHOD_KINDS for name, part in entries(kind).items()}
    names = [part.name for part in (*edits, *others)]
    # One table cannot describe two of a kind: what was given for them stays, in parentheses or in the table.
    single = {name: made[known[name].cls][0] for name in names if len(made[known[name].cls]) == 1}
    parts = {first.name: pipeline.aggregator, **single}
    values = {
        name: {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        for name, part in parts.items()
    }
    given = {name: dict(options[name]) for name in names if name not in single and name in options}
    return {name: fields for name, fields in (values | given).items() if fields}


def _known_defaults(model: str) -> dict[str, Any]:
    if ":" in model:
        return {}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in model_options(model).items()}


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
        check_keys(layer, Config)
        given = _merged(given, layer)
    settings = _merged(_suggested(given), given)
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("configuration: " + "; ".join(map(_fault, error.errors()))) from error
    _check_methods(config)
    check_personal(config)
    check_names(config.observers)
    _ = config.data.every_option
    if config.training.patience is not None and config.partition.held_out == 0:
        raise ConfigError(
            "training.patience judges by what clients hold out, and partition.held_out is 0: set it, such as to 0.1"
        )
    # What a configuration names is not run before somebody has agreed, and without a name the data set tells the task.
    if not config.task.code and (config.task.name or config.task.loss):
        _ = config.task.made()
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


def _fault(error: Any) -> str:
    """What is wrong with one value, and what to write instead where pydantic's words do not tell."""
    key, value = ".".join(map(str, error["loc"])), error["input"]
    words = error["msg"]
    if error["type"] == "tuple_type":
        words = f"wants a list in brackets: {key} = [{json.dumps(value, default=str)}]"
    elif error["type"] in ("dataclass_type", "model_type", "model_attributes_type"):
        words = f"is a table of settings: set one of them, as {key}.NAME = VALUE"
    elif key == "target":
        words = "is an accuracy above 0 and at most 1: for 90 % write 0.9"
    return f"{key} = {shown(value)}: {words}"


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
        if own_strategy(method) is None:
            settings: dict[str, Any] = {"privacy": config.privacy, "batch_norm": config.batch_norm}
            made = build_pipeline(method, config.options, trust=config.trust, **settings)
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
        build(kind, name, options)
