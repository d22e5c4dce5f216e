"""Statistics: what clients measure about their model, one file each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fedmerge.errors import UnknownName
from fedmerge.state import State
from fedmerge.statistics.base import Batches, Statistic
from fedmerge.statistics.batch_norm import BatchNormMoments
from fedmerge.statistics.local_steps import LocalSteps

__all__ = ["BatchNormMoments", "Batches", "LocalSteps", "Statistic", "compute_statistics", "statistic"]

_KINDS: Mapping[str, type[Statistic]] = {kind.name: kind for kind in (LocalSteps, BatchNormMoments)}


def statistic(name: str) -> Statistic:
    """The statistic called `name`, with its default settings.

    Raises
    ------
    UnknownName
        There is none of that name.
    """
    if name not in _KINDS:
        raise UnknownName("statistic", name, _KINDS)
    return _KINDS[name]()


def compute_statistics(model: nn.Module, loader: Batches, names: Iterable[str]) -> dict[str, Any]:
    """Measure statistics of a finished model, for :func:`fedmerge.merge` without a federation.

    Parameters
    ----------
    model
        The model to measure; it is left as it was.
    loader
        Batches ``(inputs, targets)`` of the client's examples; read once per statistic.
    names
        Statistics to measure.

    Returns
    -------
    dict
        A value per name, as ``statistics=`` of :func:`fedmerge.merge` takes it.

    Raises
    ------
    UnknownName
        A name that is no statistic.
    InvalidOption
        A statistic that only a training run can tell (``local_steps``).

    Examples
    --------
    >>> import torch
    >>> batch = (torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    >>> sorted(compute_statistics(model, [batch], ["batch_norm"])["batch_norm"])
    ['1.running_mean', '1.running_var']
    """
    return {name: _measure(name, model, loader) for name in names}


def _measure(name: str, model: nn.Module, loader: Batches) -> State:
    return statistic(name).measure(model, loader, None)
