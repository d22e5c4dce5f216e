"""Refuse partitions that cannot be made, or that leave a client with too little, and say what to change."""

from __future__ import annotations

from collections.abc import Sequence

from fedmerge.data.dataset import Dataset
from fedmerge.data.partition_settings import PartitionSettings
from fedmerge.data.partitioners import REMEDIES
from fedmerge.data.sources import WITH_NATURAL_CLIENTS
from fedmerge.errors import PartitionError

__all__ = ["check_enough_examples", "check_possible"]

_BY_LABEL = ("dirichlet", "pathological", "shard")
_MOST_NAMED = 5


def check_possible(dataset: Dataset, settings: PartitionSettings) -> None:
    """Raise PartitionError where `dataset` is not one that `settings` can divide."""
    where = f"partition of data set {dataset.name!r}, scheme {settings.scheme!r}"
    if settings.scheme == "natural":
        _check_natural(dataset, settings, where)
    elif settings.clients is not None and settings.clients > len(dataset.train_y):
        raise PartitionError(
            f"{where}: clients={settings.clients}, but there are only {len(dataset.train_y)} training examples. "
            "Use fewer clients."
        )
    if settings.scheme in _BY_LABEL and dataset.train_y.ndim > 1:
        raise PartitionError(
            f"{where}: it divides by label, but each example has {dataset.train_y.shape[1]} labels here. "
            "Use natural, iid or quantity."
        )
    if settings.scheme == "pathological" and settings.classes_per_client > dataset.num_classes:
        raise PartitionError(
            f"{where}: classes_per_client={settings.classes_per_client}, "
            f"but there are only {dataset.num_classes} classes. Use a smaller classes_per_client."
        )
    if settings.scheme == "shard" and (settings.clients or 0) * settings.shards_per_client > len(dataset.train_y):
        raise PartitionError(
            f"{where}: clients={settings.clients} with shards_per_client={settings.shards_per_client} take more shards "
            f"than the {len(dataset.train_y)} training examples. {REMEDIES['shard']}"
        )


def _check_natural(dataset: Dataset, settings: PartitionSettings, where: str) -> None:
    if dataset.train_client is None:
        raise PartitionError(
            f"{where}: it has no natural clients. Data sets that have them: {', '.join(WITH_NATURAL_CLIENTS)}. "
            "Use one of these, or another scheme."
        )
    if settings.clients is not None and settings.clients > len(dataset.client_names):
        raise PartitionError(
            f"{where}: clients={settings.clients}, but it has {len(dataset.client_names)} natural clients. "
            "Use at most so many, or clients=None for all."
        )


def check_enough_examples(counts: Sequence[int], names: Sequence[str], settings: PartitionSettings, seed: int) -> None:
    """Raise PartitionError where a client has fewer training examples than `settings.min_examples`."""
    short = [(name, count) for name, count in zip(names, counts, strict=True) if count < settings.min_examples]
    if short:
        listing = ", ".join(f"{name!r} has {count}" for name, count in short[:_MOST_NAMED])
        more = f" and {len(short) - _MOST_NAMED} more" if len(short) > _MOST_NAMED else ""
        raise PartitionError(
            f"{len(short)} of {len(names)} clients have fewer than min_examples={settings.min_examples} "
            f"training examples: {listing}{more} (seed {seed}, {settings}). {REMEDIES[settings.scheme]}"
        )
