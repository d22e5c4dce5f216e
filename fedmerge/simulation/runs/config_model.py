"""All settings of a comparison, and those of one of its runs with every default written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import Field

from fedmerge.data.partition_settings import PartitionSettings
from fedmerge.layout import BatchNormPolicy
from fedmerge.lookup.kinds import METHOD_KINDS
from fedmerge.lookup.method_names import names_code
from fedmerge.merging import build_pipeline, divided, method_parts, parts_beside
from fedmerge.models import model_options
from fedmerge.questions import Trust
from fedmerge.refine import Privacy
from fedmerge.registry import entries
from fedmerge.simulation.runs.config_sections import AttackSettings, DataSettings, ModelSettings, Section, TaskSettings
from fedmerge.simulation.scenarios.faults import Faults
from fedmerge.statistics import StatisticsSettings
from fedmerge.training.local import LocalTraining

__all__ = ["Config"]


class Config(Section):
    """Everything that a comparison depends on.

    ``methods`` may hold names of :func:`fedmerge.methods`, with other parts before and behind them, joined by ``+``,
    and options in parentheses (``fedfisher(variant=diag)``); any part may be one's own, ``module:name``, and a whole
    method ``module:Strategy``, any Flower strategy. ``options`` has a table per part. ``references`` also judges the
    clients' own models of the first round, their ensemble and the best alone. ``server_examples`` gives the server so
    many examples of the test set, for methods that use data there; the rest is the test set then. ``statistics`` says
    how clients measure what methods need; ``privacy`` masks and noise for what they answer to refinements (they then
    keep training losses and evaluations to themselves), ``trust`` how far single clients are believed there.
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
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
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
    # What is one's own is imported when it runs, and not to write down its defaults.
    edits, first, others = divided(method_parts(method, options, load=False), method, load=False)
    if ":" in first.name:
        beside, own = [*parts_beside(edits, others, method, load=False).values()], {}
    else:
        pipeline = build_pipeline(method, options, load=False)
        beside = [pipeline.edits, pipeline.server_steps, pipeline.refinements, pipeline.trajectories]
        own = {first.name: pipeline.aggregator}
    made: dict[type, list[Any]] = {}
    for part in chain.from_iterable(beside):
        made.setdefault(type(part), []).append(part)
    known = {name: part for kind in METHOD_KINDS for name, part in entries(kind).items()}
    names = [part.name for part in (*edits, *others)]
    # One table cannot describe two of a kind: what was given for them stays, in parentheses or in the table.
    single = {name: made[known[name].cls][0] for name in names if name in known and len(made[known[name].cls]) == 1}
    parts = {**own, **single}
    values = {
        name: {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        for name, part in parts.items()
    }
    if first.name in values:  # parts of one's own that it names, which were not made
        values[first.name] |= {option: value for option, value in first.options.items() if names_code(value)}
    given = {name: dict(options[name]) for name in (first.name, *names) if name not in parts and name in options}
    return {name: fields for name, fields in (values | given).items() if fields}


def _known_defaults(model: str) -> dict[str, Any]:
    if ":" in model:
        return {}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in model_options(model).items()}
