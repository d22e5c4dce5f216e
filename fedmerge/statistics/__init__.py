"""Statistics: what clients measure about their model, one file each."""

from __future__ import annotations

import json

from fedmerge.errors import InvalidOption, UnknownName
from fedmerge.registry import entries, registered
from fedmerge.statistics.activations import Activations
from fedmerge.statistics.batch_norm import BatchNormMoments, BatchNormSums
from fedmerge.statistics.class_counts import ClassCounts
from fedmerge.statistics.fisher_diag import FisherDiag
from fedmerge.statistics.fisher_kfac import FisherKfac
from fedmerge.statistics.gram import Gram
from fedmerge.statistics.head import HeadGradient, HeadSums
from fedmerge.statistics.local_steps import LocalSteps
from fedmerge.statistics.loss_gradient import LossGradient
from fedmerge.statistics.refit import RefitSums
from fedmerge.statistics.secants import Secants
from fedmerge.statistics.sending.noise import NoisySums
from fedmerge.statistics.sending.settings import StatisticsSettings
from fedmerge.statistics.statistic_type import Batches, ComparingStatistic, Statistic

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
