"""The errors that fedmerge raises: each says what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BadUpdate",
    "CannotStack",
    "ConfigError",
    "DataError",
    "FedMergeError",
    "InvalidOption",
    "MissingStatistic",
    "ModelError",
    "NoUsableUpdates",
    "PartitionError",
    "RecordError",
    "UnknownName",
    "nearest",
    "shown",
]


class FedMergeError(Exception):
    """Base of every error that fedmerge raises on purpose."""


class BadUpdate(FedMergeError):
    """One client's update cannot be merged (NaN, missing tensor, wrong shape, no examples)."""

    def __init__(self, client: int | str, reason: str, remedy: str) -> None:
        super().__init__(f"update of client {client}: {reason}. {remedy}")
        self.client, self.reason, self.remedy = client, reason, remedy

    def __reduce__(self) -> tuple[type, tuple[int | str, str, str]]:
        # Between processes an exception is made anew from its arguments, which are not its message.
        return type(self), (self.client, self.reason, self.remedy)


class NoUsableUpdates(FedMergeError):
    """Too few updates are left to merge once the bad ones are dropped."""


class MissingStatistic(BadUpdate):
    """An aggregator needs a statistic that the client did not send."""


class UnknownName(FedMergeError):
    """A name (method, data set, model, option, configuration key) that nobody registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        known = sorted(known)
        guess = nearest(name, known)
        hint = f" Did you mean {guess!r}?" if guess else ""
        listing = f" Known: {', '.join(known)}." if known else ""
        super().__init__(f"unknown {kind} {name!r}.{hint}{listing}{' ' + remedy if remedy else ''}")
        self.kind, self.name, self.known, self.remedy = kind, name, known, remedy

    def __reduce__(self) -> tuple[type, tuple[str, str, list[str], str]]:
        return type(self), (self.kind, self.name, self.known, self.remedy)


class InvalidOption(FedMergeError):
    """A hyper-parameter has a value outside its range or of the wrong type."""


class ConfigError(FedMergeError):
    """A configuration file or command line cannot be used."""


class DataError(FedMergeError):
    """A data set is missing, incomplete or unreadable."""


class PartitionError(FedMergeError):
    """A data set cannot be divided among the clients as asked."""


class ModelError(FedMergeError):
    """A model cannot be built, or does not fit the data or the tensors given."""


class CannotStack(ModelError):
    """Clients of this model cannot be trained in one call, with their weights stacked: train them one by one."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"clients cannot train with stacked weights: {reason}. Train them one by one instead.")
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.reason,)


class RecordError(FedMergeError):
    """A run record is missing, damaged or would be overwritten."""


def shown(value: object, longest: int = 200) -> str:
    """A value as an error can quote it: Python refuses to write out huge numbers, and nobody reads long texts.

    Examples
    --------
    >>> shown("a"), shown(10**9999)
    ("'a'", 'a huge number')
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "a huge number"
    return text if len(text) <= longest else f"{text[:longest]}..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None where nothing is close.

    Examples
    --------
    >>> nearest("fedvag", ["fedavg", "fednova"])
    'fedavg'
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None
