"""What an observer is: whoever watches a run, round by round, and may end it early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

__all__ = ["Ending", "Observer", "Run", "numbers_in"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The run that is about to begin, or to go on.

    Parameters
    ----------
    method, seed
        What merges, and the root of all random choices.
    rounds
        How many there will be, those that are done included.
    done
        The last round that was done before, in an earlier process; 0 where the run is new.
    rows
        What was recorded of the rounds so far, numbers that are not finite as None; empty where the run is new, or
        where nobody keeps a record.
    folder
        Where its record is written, which becomes `final` when it is complete; None where nobody keeps one.
    final
        Where the complete record will stand.
    config
        Its whole configuration.
    """

    method: str
    seed: int
    rounds: int
    done: int = 0
    rows: tuple[Row, ...] = ()
    folder: Path | None = None
    final: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its folder, or else method and seed.

        Examples
        --------
        >>> Run("fedavg", 0, 5).name
        'fedavg-seed0'
        """
        return f"{self.method}-seed{self.seed}" if self.final is None else self.final.name


@dataclass(frozen=True)
class Ending:
    """How a run has ended.

    Parameters
    ----------
    round
        The last round that is done.
    stopped
        Why it was ended early, if an observer wanted that.
    error
        What kept it from going on: an error, Ctrl-C, or None.
    """

    round: int
    stopped: str | None = None
    error: BaseException | None = None


class Observer:
    """Watches a run; what a subclass does not override it does not look at.

    An observer sees a run and cannot change it, but for ending it early: rows and tensors that it is given are its own,
    and global random generators are put back. One that raises ends the run with an error that names it.
    The same observer may watch several runs, one after the other: what it remembers begins anew with :meth:`began`.

    Examples
    --------
    >>> class Loud(Observer):
    ...     def round_done(self, row, state):
    ...         print(row["round"], row["test_loss"])
    >>> Loud().round_done({"round": 1, "test_loss": 0.5}, {})
    1 0.5
    """

    kind: ClassVar[str] = "observer"

    def began(self, run: Run) -> None:
        """A run begins, or goes on after :attr:`Run.done`."""

    def round_done(self, row: Row, state: Mapping[str, Tensor]) -> None:
        """A round is over, and its model is tested; round 0 is the initial model, before any training.

        Parameters
        ----------
        row
            What is recorded of the round: ``round``, ``test_loss``, ``train_loss``, ``clients_ok`` ...
        state
            The global model by the names of ``state_dict``.
        """

    def should_stop(self) -> str | None:
        """Why the run should end now, asked after :meth:`began` and after every round; None to go on."""
        return None

    def ended(self, ending: Ending) -> None:
        """The run is over, whichever way; whoever holds files open closes them."""


def numbers_in(row: Row) -> dict[str, float]:
    """The finite numbers of a row by name, those of tables within it as ``table/name``; neither round nor seed.

    Examples
    --------
    >>> numbers_in({"round": 2, "method": "fedavg", "test_loss": 0.5, "references": {"ensemble": 0.9}, "skipped": None})
    {'test_loss': 0.5, 'references/ensemble': 0.9}
    """
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{key}": number for key, number in numbers_in(value).items()}
        elif isinstance(value, bool) or not isinstance(value, int | float) or name in ("round", "seed"):
            continue
        elif math.isfinite(value):
            numbers[name] = float(value)
    return numbers
