"""Statistics: what clients measure about their model, one file each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fedmerge.at_hand import plain_module
from fedmerge.errors import InvalidOption, UnknownName, shown
from fedmerge.inputs import OnDeviceOf
from fedmerge.loaders import few, first_inputs, read_pairs
from fedmerge.outputs import with_one_output
from fedmerge.raw_errors import named
from fedmerge.registry import entries, registered
from fedmerge.statistics.activations import Activations
from fedmerge.statistics.base import Batches, ComparingStatistic, LayerStatistic, Statistic
from fedmerge.statistics.batch_norm import BatchNormMoments, BatchNormSums
from fedmerge.statistics.class_counts import ClassCounts
from fedmerge.statistics.fisher_diag import FisherDiag
from fedmerge.statistics.fisher_kfac import FisherKfac
from fedmerge.statistics.gram import Gram
from fedmerge.statistics.head import HeadGradient, HeadSums
from fedmerge.statistics.local_steps import LocalSteps
from fedmerge.statistics.loss_gradient import LossGradient
from fedmerge.statistics.noise import NoisySums
from fedmerge.statistics.refit import RefitSums
from fedmerge.statistics.secants import Secants
from fedmerge.statistics.settings import StatisticsSettings
from fedmerge.tasks import Reading, TaskLike, called_as_told, either

__all__ = [
    "Activations",
    "BatchNormMoments",
    "BatchNormSums",
    "Batches",
    "ClassCounts",
    "ComparingStatistic",
    "FisherDiag",
    "FisherKfac",
    "Gram",
    "HeadGradient",
    "HeadSums",
    "LocalSteps",
    "LossGradient",
    "NoisySums",
    "RefitSums",
    "Secants",
    "Statistic",
    "StatisticsSettings",
    "compute_statistics",
    "statistic",
    "tellable",
]


def statistic(name: str, settings: str = "{}") -> Statistic:
    """The statistic called `name`, with the fields that `settings` (JSON) sets and defaults for the rest.

    Raises
    ------
    UnknownName
        There is none of that name.
    InvalidOption
        Settings that it does not have.

    Examples
    --------
    >>> statistic("gram", '{"examples": 100}').examples
    100
    """
    found = registered("statistic", name)  # what others send names no module to import
    if found is None:
        raise UnknownName("statistic", name, entries("statistic"))
    try:
        given = json.loads(settings)
        if "loss" in given or "task" in given:
            raise TypeError("a loss is a function, which cannot be written")
        made: Statistic = found.cls(**given)
        return made
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidOption(f"statistic {name!r}: cannot read its settings {settings!r} ({error})") from error


def tellable(name: str) -> bool:
    """Whether `name` is a statistic that a client may report among its metrics.

    Examples
    --------
    >>> tellable("local_steps"), tellable("gram"), tellable("train_loss")
    (True, False, False)
    """
    found = registered("statistic", name)
    return found is not None and bool(found.cls.among_metrics)


def compute_statistics(
    model: nn.Module,
    loader: Batches,
    names: Iterable[str | Statistic],
    *,
    task: TaskLike | None = None,
    loss: TaskLike | None = None,
) -> dict[str, Any]:
    """Measure statistics of a finished model, for :func:`fedmerge.merge` without a federation.

    Parameters
    ----------
    model
        The model to measure; it is left as it was.
    loader
        Batches ``(inputs, targets)`` of the client's examples, on any device; read once per statistic, and once more
        where each output has a target of its own and `task` is not given.
    names
        Statistics to measure: names, or statistics with settings, such as ``Gram(layers=("fc*",))``.
    task
        What the model was trained for, for whatever speaks of labels: ``"classification"``, ``"binary"`` (one logit
        each), ``"regression"``, a loss such as ``nn.MSELoss()`` or ``F.cross_entropy``, or a
        :class:`~fedmerge.tasks.Task`; of any other ``loss(outputs, targets)`` the empirical Fisher is taken. Read from
        outputs and targets where not given, see :func:`~fedmerge.tasks.read_task`.
    loss
        Another name of `task`.

    Returns
    -------
    dict
        A value per name, as ``statistics=`` of :func:`fedmerge.merge` takes it.

    Raises
    ------
    UnknownName
        A name that is no statistic, or no task.
    TaskError
        The task cannot be known, or the targets are none of it.
    InvalidOption
        A statistic that only a training run can tell (``local_steps``), or no examples.

    Examples
    --------
    >>> import torch
    >>> batch = (torch.randn(8, 3), torch.randn(8, 1))
    >>> compute_statistics(nn.Linear(3, 1), [batch], ["fisher_diag"], task="regression")["fisher_diag"]["bias"]
    tensor([1.])
    """
    chosen, reading = _chosen(names), Reading(either(task, loss))
    model, loader = plain_module(model, "model"), read_pairs(loader, "loader")
    loader = OnDeviceOf(model, loader)
    with named(f"measuring {', '.join(kind.name for kind in chosen)}"):
        if any(isinstance(kind, LayerStatistic) for kind in chosen):
            shown = first_inputs([loader])
            model = with_one_output(called_as_told(model, reading.told, shown), few(shown))
        return {kind.name: kind.told(reading).measure(model, loader, None) for kind in chosen}


def _chosen(names: Any) -> list[Statistic]:
    """Statistics by their names, or as they are; one alone will do."""
    if isinstance(names, str | Statistic):
        names = [names]
    if not isinstance(names, Iterable) or isinstance(names, bytes | Mapping):
        known = ", ".join(map(repr, entries("statistic")))
        raise InvalidOption(f"names must be a list of statistics, such as [{known}]")
    kinds = [statistic(name) if isinstance(name, str) else name for name in names]
    for kind in kinds:
        if not isinstance(kind, Statistic):
            raise InvalidOption(f"a statistic must be a name or an object, 'gram' or Gram(), got {shown(kind)}")
    return kinds
