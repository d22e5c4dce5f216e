"""The list of observers that a run calls, and what becomes of the run where one raises or wants it to end."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedmerge.data.global_rng import untouched_global_rng
from fedmerge.errors import ConfigError, ObserverFailed, RecordError
from fedmerge.lookup.method_names import Part, parse_method
from fedmerge.observers.observer import Ending, Observer, Row, Run
from fedmerge.registry import build, checked_options, entry

__all__ = ["Calling", "ObserverLike", "RunStopped", "Watch", "check_names", "make_observers"]

log = logging.getLogger("fedmerge")

ObserverLike = Observer | str | Callable[[Any], None]
"""An observer; one as a configuration writes it, ``"early_stopping(patience=3)"``; or a function of each row."""


class RunStopped(BaseException):
    """An observer ends the run: no error, and nothing that catches errors may take it for one."""


@dataclass
class Calling(Observer):
    """Calls a function with every row."""

    function: Callable[[Any], None]

    def round_done(self, row: Row, state: Mapping[str, Tensor]) -> None:
        """Call it."""
        self.function(row)


def make_observers(given: Iterable[ObserverLike]) -> list[Observer]:
    """Observers as they are, or made of what they are called.

    Raises
    ------
    UnknownName, InvalidOption, ConfigError
        One cannot be made, or is something else.

    Examples
    --------
    >>> make_observers(["early_stopping(patience=3, column=test_accuracy)"])
    [EarlyStopping(column='test_accuracy', patience=3, min_delta=0.0, mode='auto')]
    """
    if isinstance(given, str | Observer) or callable(given):
        given = [given]
    return [_made(observer) for observer in given]


def check_names(names: Iterable[str]) -> None:
    """Make sure that observers of a configuration exist and have the options that they are given.

    None is made, for it may want a library that is not needed to look at a configuration; nor is anything imported
    that stands in a module of the user's own.

    Raises
    ------
    UnknownName, InvalidOption
        One does not, or has not.
    """
    for name in names:
        part = _read(name)
        if ":" not in part.name:
            checked_options(entry("observer", part.name), part.options)


def _read(name: str) -> Part:
    first, *others = parse_method(name)
    if others:
        raise ConfigError(f"observer {name!r}: observers are not joined by +, but stand in a list")
    return first


def _made(observer: ObserverLike) -> Observer:
    if isinstance(observer, str):
        part = _read(observer)
        try:
            made = build("observer", part.name, part.options)
        except TypeError as error:  # of a class of the user's own
            raise ConfigError(f"observer {observer!r} cannot be made: {error}") from error
        if isinstance(made, Observer):
            return made
        raise ConfigError(f"observer {observer!r} is no fedmerge.observers.Observer but a {type(made).__name__}")
    if isinstance(observer, Observer):
        return observer
    if callable(observer) and not isinstance(observer, type):
        return Calling(observer)
    raise ConfigError(
        f"an observer is a fedmerge.observers.Observer, its name, or a function of a row, got {observer!r}"
    )


class _Copied(Mapping[str, Tensor]):
    """Tensors that are copied where they are looked at."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Watch:
    """All who watch one run, told in their order.

    Parameters
    ----------
    observers
        Each is asked whether to end right after it is told of a round: those behind it find the reason in the row,
        under ``stopped``. So whoever writes the row down stands last.
    on_row
        Called with each row behind them all: the program that runs, which is told of its own errors as they are.

    Examples
    --------
    >>> with Watch([Calling(lambda row: print(row["round"], row["stopped"]))]).over(Run("fedavg", 0, 5)) as watch:
    ...     watch.round_done({"round": 1}, {})
    1 None
    """

    def __init__(self, observers: Sequence[Observer], on_row: Callable[[Any], None] | None = None) -> None:
        self._observers, self._on_row = observers, on_row
        self._round = 0
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """Why the run has been ended early, if it has."""
        return self._stopped

    @contextmanager
    def over(self, run: Run) -> Iterator[Watch]:
        """Watch a run, which is what happens in the block: it is left at once where an observer ends the run.

        Raises
        ------
        ObserverFailed
            One has raised. All others were told of the round that is over, and of the end.
        RecordError
            Whoever keeps the record could not write it.
        """
        self._round, self._stopped = run.done, None
        begun: list[Observer] = []
        try:
            for observer in self._observers:
                begun.append(observer)
                self._call(observer, "when the run began", observer.began, run)
            yield self
        except RunStopped:
            self._end(begun, None)
        except BaseException as error:
            self._end(begun, error)
            raise
        else:
            self._end(begun, None)

    def check(self, before: str | None = None) -> None:
        """End the run where an observer wants that before it is gone on with.

        Parameters
        ----------
        before
            Why it was ended already, if it was.

        Raises
        ------
        RunStopped
            It is to end.
        """
        self._stopped = before
        for observer in self._observers:
            self._ask(observer, "when the run began")
        if self._stopped:
            raise RunStopped

    def round_done(self, row: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        """Tell everybody of a round.

        Raises
        ------
        RunStopped
            An observer ends the run.
        ObserverFailed, RecordError
            As :meth:`over`.
        """
        self._round, failed = row["round"], None
        when = f"after round {self._round}"
        for observer in self._observers:
            told_row = copy.deepcopy({**row, "stopped": self._stopped})
            try:
                self._call(observer, when, observer.round_done, told_row, _Copied(state))
                self._ask(observer, when)
            except ObserverFailed as error:
                failed = failed or error  # the others have to know of the round all the same
        if self._on_row is not None:
            self._on_row(copy.deepcopy({**row, "stopped": self._stopped}))
        if failed is not None:
            raise failed
        if self._stopped:
            raise RunStopped

    def _ask(self, observer: Observer, when: str) -> None:
        """Ask an observer whether to end; the first reason counts."""
        reason = self._call(observer, when, observer.should_stop)
        if reason and self._stopped is None:
            self._stopped = reason if isinstance(reason, str) else f"{_called(observer)} ended it"

    def _end(self, observers: Sequence[Observer], error: BaseException | None) -> None:
        """Tell everybody of the end, whatever one of them does."""
        failed, ending = None, Ending(self._round, self._stopped, error)
        for observer in observers:
            try:
                self._call(observer, "when the run ended", observer.ended, ending)
            except ObserverFailed as another:
                if error is not None or failed is not None:
                    log.warning("%s", another)
                failed = failed or another
        if failed is not None and error is None:
            raise failed

    def _call(self, observer: Observer, when: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method; it finds and leaves the global random generators as they are for everybody."""
        try:
            with untouched_global_rng():
                return method(*arguments)
        except RecordError:
            raise
        except Exception as error:
            words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise ObserverFailed(_called(observer), when, words) from error


def _called(observer: Observer) -> str:
    if isinstance(observer, Calling):
        return getattr(observer.function, "__qualname__", type(observer.function).__name__)
    return type(observer).__name__
