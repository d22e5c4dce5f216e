"""End a run that gets no better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from fedmerge.errors import InvalidOption, shown
from fedmerge.observers.observer import Observer, Row, Run
from fedmerge.registry import register

__all__ = ["EarlyStopping"]

_LESS_IS_BETTER = ("loss", "error", "mae", "rmse", "perplexity")
_MORE_IS_BETTER = ("accuracy", "auroc", "f1", "iou", "r2")


@register("early_stopping")
@dataclass
class EarlyStopping(Observer):
    """End the run once a column of its rows has not got better for some rounds.

    A round in which the column is empty, or no number, is none in which it got better. A run that is resumed counts
    the rounds before, as its rows tell them.

    Parameters
    ----------
    column
        What to look at: ``test_loss``, ``test_accuracy``, ``train_loss``, or any other number of a row.
    patience
        So many rounds in a row may pass without a better value, at least 1.
    min_delta
        How much better a value has to be to count, in units of the column, at least 0.
    mode
        Whether less (``"min"``) or more (``"max"``) is better; ``"auto"`` knows losses, errors and accuracies.

    Raises
    ------
    InvalidOption
        A value out of its range, or a column of which ``"auto"`` knows nothing.

    Examples
    --------
    >>> patient = EarlyStopping(patience=2)
    >>> for round, loss in enumerate([1.0, 0.5, 0.6, 0.5]):
    ...     patient.round_done({"round": round, "test_loss": loss}, {})
    >>> patient.should_stop()
    'test_loss has not been below 0.5 for 2 rounds'
    """

    column: str = "test_loss"
    patience: int = 5
    min_delta: float = 0.0
    mode: Literal["auto", "min", "max"] = "auto"
    _best: float | None = field(default=None, init=False, repr=False)
    _waited: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise InvalidOption(f"early_stopping: patience must be at least 1 round, got {shown(self.patience)}")
        if not 0 <= self.min_delta < math.inf:
            raise InvalidOption(f"early_stopping: min_delta must be finite and at least 0, got {shown(self.min_delta)}")
        if self.mode not in ("auto", "min", "max"):
            raise InvalidOption(f'early_stopping: mode must be "auto", "min" or "max", got {shown(self.mode)}')
        _ = self._sign

    @property
    def _sign(self) -> int:
        """-1 where more is better."""
        words = self.column.casefold().replace("/", "_").split("_")
        less = self.mode == "min" or (self.mode == "auto" and not set(words).isdisjoint(_LESS_IS_BETTER))
        more = self.mode == "max" or (self.mode == "auto" and not set(words).isdisjoint(_MORE_IS_BETTER))
        if less == more:
            raise InvalidOption(f"early_stopping: is less or more of {self.column!r} better? Say mode=min or mode=max")
        return 1 if less else -1

    def began(self, run: Run) -> None:
        """Begin to count, or go on where the rows end."""
        self._best, self._waited = None, 0
        for row in run.rows:
            self.round_done(row, {})

    def round_done(self, row: Row, state: Mapping[str, Tensor]) -> None:
        """Compare with the best so far.

        Raises
        ------
        InvalidOption
            Rows have no such column, or no numbers in it.
        """
        value = self._value(row)
        if value is None or not math.isfinite(value):
            self._waited += row["round"] > 0  # before any training there may be nothing to see yet
        elif self._best is None or self._sign * (self._best - value) > self.min_delta:
            self._best, self._waited = value, 0
        else:
            self._waited += 1

    def _value(self, row: Row) -> float | None:
        value: object = row
        for name in self.column.split("/"):
            if not isinstance(value, Mapping) or (name not in value and row["round"] > 0):
                known = ", ".join(key for key, cell in row.items() if isinstance(cell, float))
                raise InvalidOption(f"early_stopping: rows have no column {self.column!r}; there are {known}")
            value = value.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InvalidOption(f"early_stopping: column {self.column!r} holds no numbers but {shown(value)}")
        return value

    def should_stop(self) -> str | None:
        """Whether patience is at an end."""
        if self._waited < self.patience:
            return None
        rounds = f"{self._waited} round{'s' if self._waited > 1 else ''}"
        if self._best is None:
            return f"{self.column} has been no number for {rounds}"
        than = f"{self._best:.6g}" + (f" by more than {self.min_delta:g}" if self.min_delta else "")
        return f"{self.column} has not been {'below' if self._sign > 0 else 'above'} {than} for {rounds}"
