"""A table as a data set: a CSV or Parquet file with a column to predict and, if it likes, a column of clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fedmerge.data.dataset import Dataset
from fedmerge.data.extras import need
from fedmerge.data.table_cells import check_cells, not_utf8
from fedmerge.data.table_features import Features, filled, targets_of
from fedmerge.errors import DataError, InvalidOption, UnknownName, shown
from fedmerge.registry import register

__all__ = ["ENDINGS", "is_table", "load_table"]

ENDINGS = (".csv", ".csv.gz", ".tsv", ".parquet", ".pq")
_SPLIT_SEED = 0


def is_table(name: str) -> bool:
    """Whether the name of a data set is that of a table's file.

    Examples
    --------
    >>> is_table("wards.csv"), is_table("digits")
    (True, False)
    """
    return name.lower().endswith(ENDINGS)


@register("table", kind="data set")
def load_table(
    data_dir: Path,
    file: str = "",
    label: str = "",
    client: str = "",
    test: str = "",
    test_share: float = 0.2,
    missing: Literal["error", "drop", "impute"] = "error",
    categorical: Sequence[str] = (),
    drop: Sequence[str] = (),
    standardise: bool = True,
    standardise_label: bool = False,
    task: str = "",
) -> Dataset:
    """Load a CSV or Parquet file with a column to predict and, if it likes, a column of clients.

    A data set whose name is a file's, such as ``wards.csv``, is this one with that `file`.

    Numbers are standardised by mean and deviation of the training rows of all clients together, which a federation
    would have to agree on first; texts, booleans and the columns in `categorical` become a column of 0 and 1 for each
    value that the training rows have (a value that only test rows have is 0 in all of them). Whole numbers and texts to
    predict are classes, sorted; numbers with fractions are a regression, see `task`.

    Parameters
    ----------
    data_dir
        Where the file lies if it is not where its path says.
    file
        The file, ``.csv``, ``.csv.gz``, ``.tsv`` or ``.parquet``. Parquet needs pyarrow.
    label
        The column to predict.
    client
        The column that says whose a row is; its values, sorted, are the natural clients. It is no input.
    test
        A column that says which rows to test on, by true and false, 1 and 0, or "test" and anything else. It is no
        input. Where not given, a fixed draw chooses them.
    test_share
        Share of the rows to test on where no column says so, in (0, 1): by client, and by class where there are
        enough of each.
    missing
        What becomes of rows with missing values: ``"error"``, ``"drop"`` the rows, or ``"impute"``: the median of the
        training rows for numbers, a value of its own for categories. A missing label or client is an error, or dropped.
    categorical
        Columns of numbers whose values are categories.
    drop
        Columns to leave out.
    standardise
        Whether numbers are standardised.
    standardise_label
        Whether numbers to be regressed on are, too: losses and errors are in units of their deviation then.
    task
        ``"regression"`` for whole numbers that are no classes, ``"classification"`` for fractions that are.

    Raises
    ------
    DataError
        The file cannot be read, or has missing values or no rows.
    UnknownName
        A column that it does not have.
    InvalidOption
        An option out of its range.
    """
    if not is_table(file):
        raise InvalidOption(f"data set 'table': file={file!r} does not end in {', '.join(ENDINGS)}")
    path = _found(file, data_dir)
    where = f"table {path.name!r}"
    frame = _read(path, where)
    columns = list(frame.columns)
    if not label:
        raise InvalidOption(f"{where}: which column is to be predicted? Say --set data.label=NAME: {_listed(columns)}")
    for key, listed in {"categorical": categorical, "drop": drop}.items():
        if isinstance(listed, str):  # whose letters would be taken for columns
            raise InvalidOption(f'{where}: {key}={listed!r} wants a list of columns in brackets: {key} = ["{listed}"]')
    for name in (label, client, test, *categorical, *drop):
        if name and name not in columns:
            raise UnknownName(f"column of {where}:", name, columns)
    _check(where, test_share, missing, label, client, test)
    aside = [name for name in dict.fromkeys((label, client, test)) if name]
    inputs = [name for name in columns if name not in (*aside, *drop)]
    if not inputs:
        raise DataError(f"{where}: no column is left for inputs besides {_listed(aside)}")
    check_cells(frame.drop(columns=list(drop)), (client, test, *categorical), where)
    frame = filled(frame, inputs, aside, missing, where)
    y, class_names = targets_of(frame[label], task, f"{where}, column {label!r}")
    held = _tested(frame, client, test, test_share, y if class_names else None, where)
    if standardise_label and not class_names:
        known = y[torch.from_numpy(~held)].double()  # whose squares may be too large for float32
        deviation = known.std(correction=0).clamp_min(torch.finfo(y.dtype).tiny)
        y = ((y.double() - known.mean()) / deviation).to(y.dtype)
    features = Features.of(frame.loc[~held, inputs], set(categorical), missing == "impute", standardise)
    x = torch.from_numpy(features.of_rows(frame))
    chosen = torch.from_numpy(held)
    natural: dict[str, Any] = {}
    if client:
        names, numbers = np.unique(frame[client].astype(str).to_numpy(dtype=str), return_inverse=True)
        natural = {
            "train_client": torch.from_numpy(numbers.astype(np.int64))[~chosen],
            "client_names": tuple(names.tolist()),
        }
    kept = [name for name in columns if name not in drop]
    return Dataset(
        name=path.name,
        train_x=x[~chosen],
        train_y=y[~chosen],
        test_x=x[chosen],
        test_y=y[chosen],
        num_classes=len(class_names),
        class_names=class_names,
        columns={name: frame.loc[~held, name].astype(str).to_numpy(dtype=str) for name in kept},
        task="" if class_names else "regression",
        **natural,
    )


def _found(file: str, data_dir: Path) -> Path:
    """Where the file lies: where its path says, or else in the folder of data."""
    path = Path(file).expanduser()
    inside = data_dir / path
    return inside if not path.is_file() and inside.is_file() else path


def _read(path: Path, where: str) -> Any:
    pandas = need("pandas", where)
    if not path.is_file():
        raise DataError(
            f"{where}: there is no file {path}, seen from {Path.cwd()}: give its path, or its folder by --data-dir"
        )
    try:
        if path.name.lower().endswith((".parquet", ".pq")):
            need("pyarrow", f"{where}, a Parquet file,")
            frame = pandas.read_parquet(path)
        else:
            frame = pandas.read_csv(path, sep="\t" if path.name.lower().endswith(".tsv") else ",")
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8{not_utf8(path)}") from error
    except Exception as error:  # pandas and pyarrow raise dozens of kinds
        raise DataError(f"{where} cannot be read: {type(error).__name__}: {shown(str(error), 200)}") from error
    if not len(frame):
        raise DataError(f"{where} has no rows")
    frame.columns = [str(name) for name in frame.columns]
    if frame.columns.duplicated().any():
        raise DataError(f"{where} has column {frame.columns[frame.columns.duplicated()][0]!r} twice")
    return frame.reset_index(drop=True)


def _check(where: str, test_share: float, missing: str, label: str, client: str, test: str) -> None:
    if not isinstance(test_share, int | float) or not 0 < test_share < 1:
        raise InvalidOption(f"{where}: test_share={test_share!r} must be a number above 0 and below 1")
    if missing not in ("error", "drop", "impute"):
        raise InvalidOption(f'{where}: missing={missing!r} must be "error", "drop" or "impute"')
    for name, other in ((label, client), (label, test), (client, test)):
        if name and name == other:
            raise InvalidOption(f"{where}: column {name!r} cannot have two meanings: label, client and test differ")


def _tested(frame: Any, client: str, test: str, share: float, classes: torch.Tensor | None, where: str) -> Any:
    """Which rows are tested on."""
    if test:
        column = frame[test]
        held = (column.astype(str).str.strip().str.lower().isin(("test", "true", "1", "1.0"))).to_numpy(copy=True)
    else:
        held = np.zeros(len(frame), dtype=bool)
        draws = np.random.default_rng(_SPLIT_SEED)
        whose = frame[client].astype(str).to_numpy(dtype=str) if client else np.zeros(len(frame), dtype=np.int64)
        labels = None if classes is None else classes.numpy()
        for owner in np.unique(whose):
            held[_share_of(np.flatnonzero(whose == owner), labels, share, draws)] = True
    if client and not test and not held.any():
        largest = int(np.unique(whose, return_counts=True)[1].max())
        more = "" if largest == 1 else f"raise test_share to {math.ceil(50 / largest) / 100:g} or more, "
        raise DataError(
            f"{where}: 0 of {len(held)} rows are for testing, for test_share = {share:g} is taken of each client's "
            f"rows, and none in column {client!r} has more than {largest}: {more}tell by data.test a column that says "
            "which rows to test on, or name no client column"
        )
    if held.all() or not held.any():
        raise DataError(
            f"{where}: {int(held.sum())} of {len(held)} rows are for testing: there have to be some to train on and "
            f"some to test on; {f'column {test!r} says which' if test else 'use more rows, or another test_share'}"
        )
    return held


def _share_of(rows: Any, labels: Any, share: float, draws: np.random.Generator) -> Any:
    """A share of one client's rows: those of each class in turn, so that rare ones are in both parts where they can."""
    drawn = draws.permutation(rows)
    if labels is not None:
        # Sorted by class, every so many rows one is taken: as many of a class as its share of the rows.
        drawn = drawn[np.argsort(labels[drawn], kind="stable")]
    ends = np.floor(np.arange(len(drawn) + 1) * share + 0.5)
    return drawn[np.diff(ends) > 0]


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 300 else text[:300] + "..."
