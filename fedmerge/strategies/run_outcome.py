"""Whether a run has merged anything: one that has not ends with an error, whatever the policies of its rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result
from torch import nn

from fedmerge.errors import BadUpdate, ClientFailed, InvalidOption, NothingMerged, NoUsableUpdates, shown
from fedmerge.strategies.failures import quoted

__all__ = ["WITHHELD", "RunOutcome", "check_start", "too_few"]

WITHHELD = (
    "the strategy around this one handed on no replies; Flower's privacy wrappers leave out a round in "
    'which any client fails: mend the client, or take on_too_few = "skip"'
)
"""Why a round did not merge whose replies never came."""


class RunOutcome:
    """What became of the rounds of one run so far."""

    def __init__(self) -> None:
        self._skipped = 0
        self._last: NoUsableUpdates | None = None

    def skip(self, error: NoUsableUpdates) -> None:
        """Count a round that did not merge, and why."""
        self._skipped += 1
        self._last = error

    def checked(self, result: Result, initial: ArrayRecord) -> Result:
        """The result of a run that is over; where no round was to train, its model is the initial one.

        Raises
        ------
        NothingMerged
            Rounds were to merge, and none did.
        """
        if result.arrays:  # of this run, or of an earlier process that it went on from
            return result
        if self._last is not None:
            rounds = "the only round" if self._skipped == 1 else f"none of {self._skipped} rounds"
            ending = "did not merge" if self._skipped == 1 else "merged"
            raise NothingMerged(
                f"{rounds} {ending} anything, so there is no trained model; the last one: {self._last}",
                self._last.dropped,
                self._last.failed,
            )
        result.arrays = initial
        return result


def too_few(
    round: int, reason: str, dropped: Sequence[BadUpdate] = (), failed: Sequence[ClientFailed] = ()
) -> NoUsableUpdates:
    """The error of a round with too few updates, which quotes the clients that failed.

    Examples
    --------
    >>> str(too_few(2, "no client replied with an update", failed=[ClientFailed(0, 2, "OSError: no disk")]))
    'round 2: no client replied with an update (client 0 failed: OSError: no disk)'
    """
    told = f" ({quoted(failed)})" if failed else ""
    return NoUsableUpdates(f"round {round}: {reason}{told}", dropped, failed)


def check_start(start: Callable[..., Result], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a strategy's ``start`` by their names, with those that were left out.

    Raises
    ------
    InvalidOption
        There is not one round to run, so nothing can be merged; or an argument is missing, unknown or no model.
    """
    try:
        given = signature(start).bind(*arguments, **keywords)
    except TypeError as error:
        known = ", ".join(signature(start).parameters)
        raise InvalidOption(f"start(...) of a strategy: {error}; it takes {known}") from error
    given.apply_defaults()
    rounds = given.arguments["num_rounds"]
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InvalidOption(f"num_rounds must be a number of rounds, an integer of at least 1, got {shown(rounds)}")
    initial = given.arguments["initial_arrays"]
    if not isinstance(initial, ArrayRecord):
        remedy = "to_arrays(model.state_dict())" if isinstance(initial, nn.Module) else "to_arrays(state_dict)"
        raise InvalidOption(
            f"initial_arrays must be an ArrayRecord, got a {type(initial).__name__}: pass fedmerge.strategies.{remedy}"
        )
    return dict(given.arguments)
