"""Sections of a configuration: the data, the model, the task, and clients that attack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fedmerge.adapters import Adapters, OwnRanks
from fedmerge.data.table import ENDINGS, is_table
from fedmerge.errors import ConfigError
from fedmerge.models.pretrained import FILE_ENDINGS, Pretrained, is_base_file
from fedmerge.records.model_tensors import digest
from fedmerge.registry import build
from fedmerge.simulation.scenarios.attacks import Attack
from fedmerge.tasks import Classification, Task, make_task

__all__ = ["AttackSettings", "DataSettings", "LoraSettings", "ModelSettings", "Section", "TaskSettings"]


class Section(BaseModel):
    """Settings of which no others are allowed, and which nobody changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(Section):
    """Which data set, and where it lies: a name, a table's file, or ``module:function``.

    ``label`` is a table's column to predict, ``client`` its column of clients; ``options`` are what
    :func:`~fedmerge.data.table.load_table` takes besides, or the function.

    ``domains`` change clients' images, and the test set in equal shares: ``["rotated"]``, or single ones such as
    ``["original", "blur(sigma=2)"]``; see :mod:`fedmerge.data.domains`. Clients do not get the examples that the
    pretrained base was trained on, where ``fedmerge pretrain`` has made it, unless ``withhold`` is false.
    """

    name: str = "digits"
    dir: Path | None = None
    label: str | None = None
    client: str | None = None
    options: dict[str, Any] = {}
    domains: tuple[str, ...] = ()
    withhold: bool = True

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


class LoraSettings(Section):
    """Low-rank adapters beside a model's layers, which clients then train instead of it.

    ``targets`` are patterns of layers, and ``train`` of parameters that are trained besides, such as ``["head"]``, see
    :func:`fedmerge.adapters.lora`. With lists for ``rank`` and ``alpha``, client i has the i-th of each, counted
    around; the server's model has the largest rank.
    """

    rank: int | tuple[int, ...] = 4
    alpha: float | tuple[float, ...] = 8.0
    targets: tuple[str, ...] = ("*",)
    train: tuple[str, ...] = ()
    rank_stabilized: bool = False

    @property
    def adapters(self) -> Adapters:
        """The same, checked.

        Raises
        ------
        InvalidOption
            A rank or an alpha is none.
        """
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)
        return Adapters(OwnRanks(ranks, alphas, self.rank_stabilized), self.targets, self.train)


class ModelSettings(Section):
    """Which model: a name or ``module:factory``, and its widths.

    With ``apart``, clients start the first round from an initialisation of their own; with ``variants`` also at
    widths of their own, client i having the options ``variants[i % len(variants)]`` over the common ones. ``frozen``
    are patterns of parameters that nobody trains, such as ``["features.*"]``: they are not sent.

    With ``pretrained``, a file or ``module:factory``, the server and all clients start from that base, see
    :class:`~fedmerge.models.pretrained.Pretrained`. ``prefix`` gives its names other beginnings, such as
    ``{"module." = ""}``; tensors that match ``pretrained_except``, such as ``["head.*"]``, stay as initialised.
    ``pretrained_digest`` is filled in when a configuration is read: a record can only be taken up with the same file.

    With ``lora``, clients train low-rank adapters and the base is frozen, see :class:`LoraSettings`.
    """

    name: str = "mlp"
    options: dict[str, Any] = {}
    apart: bool = False
    variants: tuple[dict[str, Any], ...] = ()
    frozen: tuple[str, ...] = ()
    pretrained: str | None = None
    pretrained_except: tuple[str, ...] = ()
    prefix: dict[str, str] = {}
    pretrained_digest: str | None = None
    lora: LoraSettings | None = None

    @property
    def adapters(self) -> Adapters | None:
        """The adapters that the model gets, if any."""
        return None if self.lora is None else self.lora.adapters

    @property
    def base(self) -> Pretrained | None:
        """What the model starts from, where that is no initialisation."""
        if self.pretrained is None:
            return None
        prefix = tuple(self.prefix.items())
        return Pretrained(self.pretrained, self.pretrained_digest or "", prefix, self.pretrained_except)

    @property
    def own_base(self) -> tuple[str, ...]:
        """Name of the code that makes the base, if any."""
        return () if self.pretrained is None or is_base_file(self.pretrained) else (self.pretrained,)

    def with_base_found(self) -> ModelSettings:
        """The same with the full path of the base's file and its digest.

        Raises
        ------
        ConfigError
            The file has changed, or a setting means nothing with this base or without one.
        ModelError
            There is no such file.
        """
        if self.pretrained is None:
            names = ("pretrained_except", "prefix", "pretrained_digest")
            unused = next((name for name in names if getattr(self, name)), None)
            if unused is not None:
                raise ConfigError(f"model.{unused} is for a pretrained base: name one in model.pretrained")
            return self
        if self.variants:
            raise ConfigError(
                "model.variants gives clients widths of their own, which one pretrained base does not have: leave out "
                "model.variants or model.pretrained"
            )
        if self.apart and not self.pretrained_except:
            raise ConfigError(
                "model.apart has clients start apart, and model.pretrained from one base: leave one out, or name what "
                "each initialises for itself in model.pretrained_except"
            )
        if not is_base_file(self.pretrained):
            if ":" not in self.pretrained or self.pretrained_digest:
                raise ConfigError(
                    f"model.pretrained = {self.pretrained!r}: name a file that ends in {' or '.join(FILE_ENDINGS)}, or "
                    "module:factory, which has no pretrained_digest"
                )
            return self
        file = Path(self.pretrained).expanduser().resolve()
        found = digest(file)
        if self.pretrained_digest not in (None, found):
            raise ConfigError(
                f"{file} is not the file that this was run with (model.pretrained_digest differs): put the old file "
                "back, or begin a new run in another folder"
            )
        return self.model_copy(update={"pretrained": str(file), "pretrained_digest": found})


class TaskSettings(Section):
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


class AttackSettings(Section):
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
