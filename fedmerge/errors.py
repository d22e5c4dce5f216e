"""The errors that fedmerge raises: each says what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedmerge.plain_text import one_line

__all__ = [
    "AdapterError",
    "BadArgument",
    "BadStatistic",
    "BadUpdate",
    "CannotMatch",
    "CannotStack",
    "ClientFailed",
    "ConfigError",
    "DataError",
    "FedMergeError",
    "FolderInUse",
    "InjectedFault",
    "InvalidOption",
    "MissingExtra",
    "MissingStatistic",
    "ModelError",
    "NoAnswer",
    "NoUsableUpdates",
    "NothingMerged",
    "ObserverFailed",
    "PartitionError",
    "RecordError",
    "TaskError",
    "UnknownName",
    "WorkersUnavailable",
    "WriteError",
    "nearest",
    "shown",
]


class FedMergeError(Exception):
    """Base of every error that fedmerge raises on purpose."""


class AdapterError(FedMergeError):
    """Low-rank adapters of a model cannot be found, read or merged."""


class BadUpdate(FedMergeError):
    """One client's update cannot be merged (NaN, missing tensor, wrong shape, no examples)."""

    def __init__(self, client: int | str, reason: str, remedy: str) -> None:
        reason = one_line(reason)  # it may quote the client
        super().__init__(f"update of client {client}: {reason}. {remedy}")
        self.client, self.reason, self.remedy = client, reason, remedy

    def __reduce__(self) -> tuple[type, tuple[int | str, str, str]]:
        # Between processes an exception is made anew from its arguments, which are not its message.
        return type(self), (self.client, self.reason, self.remedy)


class BadArgument(BadUpdate):
    """What was passed beside models at hand, ``base=`` or ``statistics=``, does not go with them.

    ``where`` says what it is; ``client`` is the number of the model that it does not go with.
    """

    def __init__(self, where: str, client: int, reason: str, remedy: str) -> None:
        FedMergeError.__init__(self, f"{where}: {one_line(reason)}. {remedy}")
        self.where, self.client, self.reason, self.remedy = where, client, reason, remedy

    def __reduce__(self) -> tuple[type, Any]:
        return type(self), (self.where, self.client, self.reason, self.remedy)


class BadStatistic(BadUpdate):
    """What a client has measured cannot be of its model."""


class CannotMatch(FedMergeError):
    """Neurons of some clients cannot be matched with the others': those ``dropped`` are left out of the merge."""

    def __init__(self, dropped: Sequence[BadUpdate]) -> None:
        super().__init__("; ".join(str(bad) for bad in dropped))
        self.dropped = tuple(dropped)

    def __reduce__(self) -> tuple[type, tuple[tuple[BadUpdate, ...]]]:
        return type(self), (self.dropped,)


class NoUsableUpdates(FedMergeError):
    """Too few updates are left to merge: bad ones were ``dropped``, and clients have ``failed``."""

    def __init__(self, message: str, dropped: Sequence[BadUpdate] = (), failed: Sequence[ClientFailed] = ()) -> None:
        super().__init__(message)
        self.dropped, self.failed = tuple(dropped), tuple(failed)

    def __reduce__(self) -> tuple[type, tuple[str, tuple[BadUpdate, ...], tuple[ClientFailed, ...]]]:
        return type(self), (str(self), self.dropped, self.failed)


class NothingMerged(NoUsableUpdates):
    """A run has ended, and no round of it merged anything: its model is the initial one."""


class ClientFailed(FedMergeError):
    """A client raised, or did not reply, and the policy is that this ends the run."""

    def __init__(self, client: int | str, round: int, reason: str) -> None:
        reason = one_line(reason)
        super().__init__(
            f"round {round}: client {client} failed: {reason}. "
            'Mend the client, or take on_client_error = "skip", which leaves it out of the round.'
        )
        self.client, self.round, self.reason = client, round, reason

    def __reduce__(self) -> tuple[type, tuple[int | str, int, str]]:
        return type(self), (self.client, self.round, self.reason)


class InjectedFault(FedMergeError):
    """A simulated client failed because the configuration's ``faults`` say so."""


class MissingStatistic(BadUpdate):
    """An aggregator needs a statistic that the client did not send."""


class UnknownName(FedMergeError):
    """A name (method, data set, model, option, configuration key) that nobody registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str], remedy: str = "", guess: str | None = None) -> None:
        known = sorted(known)
        guess = guess or nearest(name, known)
        hint = f" Did you mean {guess!r}?" if guess else ""
        listing = f" Known: {', '.join(known)}." if known else ""
        super().__init__(f"unknown {kind} {name!r}.{hint}{listing}{' ' + remedy if remedy else ''}")
        self.kind, self.name, self.known, self.remedy, self.guess = kind, name, known, remedy, guess

    def __reduce__(self) -> tuple[type, tuple[str, str, list[str], str, str | None]]:
        return type(self), (self.kind, self.name, self.known, self.remedy, self.guess)


class InvalidOption(FedMergeError):
    """A hyper-parameter has a value outside its range or of the wrong type."""


class ConfigError(FedMergeError):
    """A configuration file or command line cannot be used."""


class MissingExtra(ConfigError):
    """A library that only some parts need is not installed: an extra of fedmerge brings it."""

    def __init__(self, who: str, extra: str, reason: str) -> None:
        super().__init__(f'{who} cannot be used ({one_line(reason)}). Install it: pip install "fedmerge[{extra}]".')
        self.who, self.extra, self.reason = who, extra, reason

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.who, self.extra, self.reason)


class WorkersUnavailable(ConfigError):
    """Ray cannot be reached or started, so there is nobody who could run the clients."""


class DataError(FedMergeError):
    """A data set is missing, incomplete or unreadable."""


class PartitionError(FedMergeError):
    """A data set cannot be divided among the clients as asked."""


class TaskError(InvalidOption):
    """A model's outputs, its targets and what it is told to do with them do not go together, or cannot be known."""


class ModelError(FedMergeError):
    """A model cannot be built, or does not fit the data or the tensors given."""


class CannotStack(ModelError):
    """Clients of this model cannot be trained in one call, with their weights stacked: train them one by one."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"clients cannot train with stacked weights: {reason}. Train them one by one instead.")
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.reason,)


class NoAnswer(FedMergeError):
    """No client answered a question about the merged model with anything that can be used."""


class ObserverFailed(FedMergeError):
    """An observer has raised, which ends the run that it watches: what is recorded stays whole."""

    def __init__(self, observer: str, when: str, reason: str) -> None:
        super().__init__(
            f"observer {observer} failed {when}: {one_line(reason)}. All rounds so far are kept: mend the observer, or "
            "leave it out, and go on"
        )
        self.observer, self.when, self.reason = observer, when, reason

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.observer, self.when, self.reason)


class RecordError(FedMergeError):
    """A run record is missing, damaged or would be overwritten."""


class FolderInUse(RecordError):
    """Another process writes to a record, to the folder of a comparison, or to one of checkpoints."""

    def __init__(self, what: str | Path, lock: Path, holder: object | None, *, elsewhere: bool = False) -> None:
        who = "a process that has not said who it is yet" if holder is None else str(holder)
        if elsewhere:
            message = (
                f"{what} is in use by {who}, as {lock} says, and nobody can tell from here whether that still runs"
            )
            remedy = "wait until it has ended; if it has without removing that file, as at a power cut, delete the file"
        else:
            message, remedy = f"{what} is in use by {who}", "wait until it has ended, or end it first"
        super().__init__(f"{message}: {remedy}")
        self.what, self.lock, self.holder, self.elsewhere = what, lock, holder, elsewhere

    def __reduce__(self) -> tuple[object, ...]:
        return _in_use, (self.what, self.lock, self.holder, self.elsewhere)


def _in_use(what: str | Path, lock: Path, holder: object | None, elsewhere: bool) -> FolderInUse:
    return FolderInUse(what, lock, holder, elsewhere=elsewhere)


class WriteError(RecordError):
    """A file of a record cannot be written: the disk is full, or the place does not allow it."""

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"{path} cannot be written: {reason}. {remedy}")
        self.path, self.reason, self.remedy = path, reason, remedy

    def __reduce__(self) -> tuple[type, tuple[Path, str, str]]:
        return type(self), (self.path, self.reason, self.remedy)

    @classmethod
    def because(cls, path: Path, error: OSError) -> WriteError:
        """What the system says about writing `path`, and what to do."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return cls(path, error.strerror or str(error), "Free some space" if full else "Choose another place")


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
    """The known name closest to `name`, or None where nothing is close; capitals, ``-`` and ``_`` do not count.

    Examples
    --------
    >>> nearest("fedvag", ["fedavg", "fednova"])
    'fedavg'
    >>> nearest("MNIST", ["mnist", "cifar10"])
    'mnist'
    """
    plain = {_plain(candidate): candidate for candidate in known}
    close = difflib.get_close_matches(_plain(name), list(plain), n=1, cutoff=0.5)
    return plain[close[0]] if close else None


def _plain(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "")
