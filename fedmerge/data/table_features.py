"""From the columns of a table to numbers that a model takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.errors import DataError

__all__ = ["Features", "filled", "targets_of"]

_MISSING = "missing"
_MOST_CATEGORIES = 1000
_MOST_CLASSES = 1000


def filled(frame: Any, inputs: Sequence[str], aside: Sequence[str], missing: str, where: str) -> Any:
    """The table without missing values that nobody has said what to do with.

    Raises
    ------
    DataError
        There are some; column and number of rows are named.
    """
    frame = frame.replace([np.inf, -np.inf], np.nan)
    needed = list(aside) if missing == "impute" else [*aside, *inputs]
    holes = frame[needed].isna()
    counts = holes.sum()
    bad = counts[counts > 0]
    if not len(bad):
        return frame
    if missing == "drop":
        kept = frame[~holes.any(axis=1)].reset_index(drop=True)
        if not len(kept):
            raise DataError(f"{where}: every row has a missing value: drop the columns that are empty")
        return kept
    listed = ", ".join(f"{name!r} in {count} of {len(frame)} rows" for name, count in list(bad.items())[:5])
    more = f" and {len(bad) - 5} columns more" if len(bad) > 5 else ""
    remedy = "say --set data.options.missing=drop (these rows)"
    if missing != "impute":
        remedy += " or =impute (medians), or leave columns out by data.options.drop"
    raise DataError(f"{where} has missing or infinite values: {listed}{more}: {remedy}")


def targets_of(column: Any, task: str, where: str) -> tuple[Tensor, tuple[str, ...]]:
    """Class numbers and names of the classes, or numbers to be regressed on and no names.

    Raises
    ------
    DataError
        There is one class alone, or there are too many.
    """
    numbers = column.dtype.kind in "iuf"
    if column.dtype.kind == "b":
        column = column.astype(int)
    if task not in ("", "classification", "regression"):
        raise DataError(f'{where}: task={task!r} of a table is "classification" or "regression"')
    if task == "regression" and column.dtype.kind not in "iuf":
        raise DataError(f"{where}: a regression wants numbers, the column holds {column.dtype}")
    whole = column.dtype.kind in "iu" or (column.dtype.kind == "f" and bool((column % 1 == 0).all()) and bool(task))
    if task == "regression" or (not task and column.dtype.kind == "f") or (numbers and not whole and not task):
        return torch.from_numpy(column.to_numpy(dtype=np.float32, copy=True)), ()
    values, classes = np.unique(
        column.to_numpy() if numbers or column.dtype.kind in "iu" else column.astype(str).to_numpy(dtype=str),
        return_inverse=True,
    )
    if len(values) < 2:
        raise DataError(f"{where}: all rows have the class {values[0]!s}: there is nothing to learn")
    if len(values) > _MOST_CLASSES:
        raise DataError(
            f"{where}: {len(values)} different values are too many for classes: say --set data.options.task=regression "
            "where they are numbers"
        )
    return torch.from_numpy(classes.reshape(-1).astype(np.int64)), tuple(map(str, values.tolist()))


@dataclass(frozen=True)
class _Number:
    """A column of numbers: ``(value - mean) / deviation``."""

    name: str
    fill: float
    mean: float
    deviation: float

    def of_rows(self, column: Any) -> list[NDArray[np.float32]]:
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        values = np.where(np.isnan(values), self.fill, values)
        return [((values - self.mean) / self.deviation).astype(np.float32)]


@dataclass(frozen=True)
class _Category:
    """A column of categories: 1 in the place of the row's value."""

    name: str
    values: tuple[str, ...]

    def of_rows(self, column: Any) -> list[NDArray[np.float32]]:
        texts = _texts(column)
        return [(texts == value).astype(np.float32) for value in self.values]


@dataclass(frozen=True)
class Features:
    """What was learnt from the training rows, to turn any rows into inputs.

    Examples
    --------
    >>> import pandas
    >>> frame = pandas.DataFrame({"age": [1.0, 3.0], "ward": ["a", "b"]})
    >>> Features.of(frame, set(), fills=False, standardise=True).of_rows(frame).tolist()
    [[-1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    """

    columns: tuple[_Number | _Category, ...]

    @classmethod
    def of(cls, frame: Any, categorical: Collection[str], fills: bool, standardise: bool) -> Features:
        """Means, deviations and categories of the training rows."""
        return cls(tuple(_learnt(frame[name], name in categorical, fills, standardise) for name in frame.columns))

    def of_rows(self, frame: Any) -> NDArray[np.float32]:
        """Inputs [n, d] of rows with the same columns."""
        return np.stack([part for feature in self.columns for part in feature.of_rows(frame[feature.name])], axis=1)


def _learnt(column: Any, category: bool, fills: bool, standardise: bool) -> _Number | _Category:
    name = str(column.name)
    if category or column.dtype.kind not in "iuf":
        values = np.unique(_texts(column))
        if len(values) > _MOST_CATEGORIES:
            raise DataError(
                f"column {name!r} has {len(values)} different values, too many for categories: leave it out "
                "(data.options.drop), as a name or a date is no input"
            )
        return _Category(name, tuple(values.tolist()))
    numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
    known = numbers[~np.isnan(numbers)]
    if not len(known):
        raise DataError(f"column {name!r} has no value in any training row: leave it out (data.options.drop)")
    fill = float(np.median(known)) if fills else 0.0
    numbers = np.where(np.isnan(numbers), fill, numbers)
    if not standardise:
        return _Number(name, fill, 0.0, 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = float(numbers.std())
    if not np.isfinite(deviation):
        raise DataError(
            f"column {name!r} has numbers up to {np.abs(known).max():.3g}, too large to standardise: mend or leave out "
            "these rows, or the column (data.options.drop)"
        )
    # A constant column tells nothing: it becomes zero rather than NaN.
    return _Number(name, fill, float(numbers.mean()), deviation if deviation > 0 else 1.0)


def _texts(column: Any) -> NDArray[np.str_]:
    objects = column.astype(object)
    texts: NDArray[np.str_] = objects.where(objects.notna(), _MISSING).astype(str).to_numpy(dtype=str)
    return texts
