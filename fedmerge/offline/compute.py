"""Measuring statistics of a model that is at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fedmerge.checks.raw_errors import named
from fedmerge.errors import BadStatistic, InvalidOption, TaskError, shown
from fedmerge.inputs import OnDeviceOf
from fedmerge.offline.at_hand import plain_module
from fedmerge.offline.loaders import few, first_inputs, read_pairs
from fedmerge.offline.outputs import with_one_output
from fedmerge.registry import entries
from fedmerge.state import State
from fedmerge.statistics import Batches, Statistic, StatisticsSettings, statistic
from fedmerge.statistics.layer_statistic import LayerStatistic
from fedmerge.statistics.sending.compression import decode
from fedmerge.statistics.sending.settings import compressed
from fedmerge.tasks import Reading, TaskLike, called_as_told, either

__all__ = ["as_sent", "compute_statistics", "statistics_of"]


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


def statistics_of(
    client: int,
    needs: Sequence[Statistic],
    known: Mapping[str, Any],
    model: nn.Module,
    batches: Batches | None,
    reading: Reading,
) -> dict[str, State]:
    """The needed statistics of one model, from what was given or else measured."""
    statistics = {}
    for kind in needs:
        name = kind.name
        if name in known:
            value = known[name]
            try:
                # A bare number stands for itself, with its companions beside it: {"local_steps": 12, "momentum": 0.9}.
                statistics[name] = kind.parse(value if isinstance(value, Mapping) else known)
            except InvalidOption as error:
                raise BadStatistic(client, str(error), "Mend its entry of statistics=.") from error
        elif batches is not None or kind.optional:
            try:
                statistics[name] = kind.told(reading).measure(model, batches or (), None)
            except TaskError as error:
                raise TaskError(f"clients[{client}]: {error}") from error
    return statistics


def as_sent(statistics: Mapping[str, State], model: nn.Module, settings: StatisticsSettings) -> dict[str, State]:
    """What arrives of statistics where bytes are few."""
    sent, _ = compressed(
        list(statistics.items()), dict(model.named_parameters()), settings.compression, settings.budget
    )
    return {name: decode(value) for name, value in sent.items()}
