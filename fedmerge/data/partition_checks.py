"""Refuse partitions that cannot be made, or that leave a client with too little, and say what to change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmerge.data.dataset import Dataset
from fedmerge.data.partition_settings import PartitionSettings
from fedmerge.data.partitioners import REMEDIES, remedy_of
from fedmerge.data.sources import WITH_NATURAL_CLIENTS
from fedmerge.errors import PartitionError

__all__ = ["check_enough_examples", "check_possible", "column_of"]

_BY_LABEL = ("dirichlet", "pathological", "shard", "by_class_groups")
_MOST_NAMED = 5


def check_possible(dataset: Dataset, settings: PartitionSettings) -> None:
    """Raise PartitionError where `dataset` is not one that `settings` can divide."""
    where = f"partition of data set {dataset.name!r}, scheme {settings.scheme!r}"
    if settings.scheme == "natural":
        _check_natural(dataset, settings, where)
    elif settings.scheme == "column":
        values = column_of(dataset, settings)
        _check_number(settings, len(np.unique(values)), where, "values in the column")
    elif settings.clients is not None and settings.clients > len(dataset.train):
        raise PartitionError(
            f"{where}: clients={settings.clients}, but there are only {len(dataset.train)} training examples. "
            "Use fewer clients."
        )
    if settings.scheme in _BY_LABEL:
        _check_labels(dataset, where)
    if settings.scheme == "pathological" and settings.classes_per_client > dataset.num_classes:
        raise PartitionError(
            f"{where}: classes_per_client={settings.classes_per_client}, "
            f"but there are only {dataset.num_classes} classes. Use a smaller classes_per_client."
        )
    if settings.scheme == "shard" and (settings.clients or 0) * settings.shards_per_client > len(dataset.train):
        raise PartitionError(
            f"{where}: clients={settings.clients} with shards_per_client={settings.shards_per_client} take more shards "
            f"than the {len(dataset.train)} training examples. {REMEDIES['shard']}"
        )


def _check_natural(dataset: Dataset, settings: PartitionSettings, where: str) -> None:
    if dataset.train_client is None:
        raise PartitionError(
            f"{where}: it has no natural clients. Data sets that have them: {', '.join(WITH_NATURAL_CLIENTS)}. "
            "Use one of these, or another scheme."
        )
    _check_number(settings, len(dataset.client_names), where, "natural clients")


def _check_number(settings: PartitionSettings, known: int, where: str, what: str) -> None:
    if settings.clients is not None and settings.clients > known:
        raise PartitionError(
            f"{where}: clients={settings.clients}, but it has {known} {what}. "
            "Use at most so many, or clients=None for all."
        )


def _check_labels(dataset: Dataset, where: str) -> None:
    labels = dataset.train_labels
    if labels.is_floating_point():
        raise PartitionError(
            f"{where}: it divides by class, but the labels are numbers to be regressed on. "
            "Use natural, column, iid or quantity."
        )
    if labels.ndim > 1:
        raise PartitionError(
            f"{where}: it divides by label, but each example has {labels[0].numel()} labels here. "
            "Use natural, iid or quantity."
        )


def column_of(dataset: Dataset, settings: PartitionSettings) -> NDArray[np.generic]:
    """The values that a partition by column goes by, one for each training example.

    Raises
    ------
    PartitionError
        There is no such column.
    """
    if settings.column not in dataset.columns:
        known = ", ".join(dataset.columns) or "none"
        raise PartitionError(
            f"partition of data set {dataset.name!r} by column {settings.column!r}: it has no such column. Columns "
            f"that it can be divided by: {known}."
        )
    return np.asarray(dataset.columns[settings.column])


def check_enough_examples(counts: Sequence[int], names: Sequence[str], settings: PartitionSettings, seed: int) -> None:
    """Raise PartitionError where a client has fewer training examples than `settings.min_examples`."""
    short = [(name, count) for name, count in zip(names, counts, strict=True) if count < settings.min_examples]
    if short:
        listing = ", ".join(f"{name!r} has {count}" for name, count in short[:_MOST_NAMED])
        more = f" and {len(short) - _MOST_NAMED} more" if len(short) > _MOST_NAMED else ""
        raise PartitionError(
            f"{len(short)} of {len(names)} clients have fewer than min_examples={settings.min_examples} "
            f"training examples: {listing}{more} (seed {seed}, {settings}). {remedy_of(settings.scheme)}"
        )
