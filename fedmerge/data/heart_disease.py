"""Heart disease in four hospitals: small tables, and natural clients that differ.

Rows, columns, division into training and test part and standardisation are those of FLamby's Fed-Heart-Disease
(arXiv:2210.04620), so that what is measured here can be held against its tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.data.dataset import Dataset
from fedmerge.data.extras import need
from fedmerge.errors import DataError
from fedmerge.registry import register

__all__ = ["load_heart_disease"]

_HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
_COLUMNS = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak")
_CATEGORIES = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2)}
_FILE_COLUMNS = 14  # _COLUMNS, then slope, ca, thal (mostly missing, dropped), num
_TEST_SHARE = 0.34
_SPLIT_SEED = 43  # FLamby's
_FEWEST_PATIENTS = 6  # any fewer cannot be split in three

Table = NDArray[np.float64]


@register("heart_disease", kind="data set")
def load_heart_disease(data_dir: Path, standardised: Literal["hospital", "all"] = "hospital") -> Dataset:
    """Load 740 patients `[n, 13]`, of whom `train_client` names the hospital; class 1 has the disease.

    A patient with a missing value is left out. Chest pain and ECG are one-hot (first category dropped). Every column
    has mean 0 and variance 1 over training patients.

    Parameters
    ----------
    data_dir : Path
        Holds `heart-disease/processed.HOSPITAL.data` for cleveland, hungarian, switzerland and va.
    standardised
        ``"hospital"``: by each hospital's own training patients, as hospitals can without telling anybody of them;
        ``"all"``: by those of all hospitals, as pooled training can.

    Raises
    ------
    DataError
        Where a file is missing or does not hold what it should, or scikit-learn is not installed.

    Examples
    --------
    >>> load_heart_disease(Path("somewhere"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fedmerge.errors.DataError: data set 'heart_disease': ... not found...
    """
    split = need("sklearn.model_selection", "data set 'heart_disease'").train_test_split
    train_parts, test_parts = [], []
    for hospital in _HOSPITALS:
        rows = _read(data_dir / "heart-disease" / f"processed.{hospital}.data")
        ill = rows[:, -1] > 0
        # Switzerland has a single complete patient without the disease: nothing to divide by class.
        by_class = ill if min(ill.sum(), (~ill).sum()) > 2 else None
        train, test = split(rows, test_size=_TEST_SHARE, stratify=by_class, random_state=_SPLIT_SEED)
        train_parts.append(train)
        test_parts.append(test)
    references = train_parts if standardised == "hospital" else [np.concatenate(train_parts)] * len(_HOSPITALS)
    train_x, test_x = (
        torch.cat([_features(part, reference) for part, reference in zip(parts, references, strict=True)])
        for parts in (train_parts, test_parts)
    )
    train, test = np.concatenate(train_parts), np.concatenate(test_parts)
    clients = np.repeat(np.arange(len(_HOSPITALS)), [len(part) for part in train_parts])
    return Dataset(
        name="heart_disease",
        train_x=train_x,
        train_y=torch.from_numpy(train[:, -1] > 0).to(torch.int64),
        test_x=test_x,
        test_y=torch.from_numpy(test[:, -1] > 0).to(torch.int64),
        num_classes=2,
        train_client=torch.from_numpy(clients),
        client_names=_HOSPITALS,
        class_names=("healthy", "disease"),
    )


def _read(path: Path) -> Table:
    """Patients with every value present: `[n, 11]`, the ten columns kept and num."""
    if not path.is_file():
        raise DataError(
            f"data set 'heart_disease': {path} not found. Point --data-dir or FEDMERGE_DATA at the folder that "
            "holds heart-disease/ with the UCI files "
            f"{', '.join(f'processed.{hospital}.data' for hospital in _HOSPITALS)}."
        )
    try:
        table = np.genfromtxt(path, delimiter=",", missing_values="?", ndmin=2)
    except ValueError as error:
        raise _damaged(path, str(error).strip().splitlines()[0]) from error
    if table.shape[1] != _FILE_COLUMNS:
        raise _damaged(path, f"{table.shape[1]} columns instead of {_FILE_COLUMNS}")
    rows: Table = table[:, [*range(len(_COLUMNS)), -1]]
    rows = rows[~np.isnan(rows).any(axis=1)]
    for column, categories in _CATEGORIES.items():
        if not np.isin(rows[:, _COLUMNS.index(column)], categories).all():
            raise _damaged(path, f"column {column} has values other than {categories}")
    if len(rows) < _FEWEST_PATIENTS:
        raise _damaged(path, f"only {len(rows)} patients with every value")
    return rows


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"data set 'heart_disease': {path} is damaged: {reason}. Fetch the UCI file again.")


def _features(rows: Table, reference: Table) -> torch.Tensor:
    columns, known = _columns(rows), _columns(reference)
    spread = known.std(axis=0, ddof=1)
    # A column that is constant among the training patients tells nothing: it becomes zero rather than NaN.
    spread[spread == 0] = np.inf
    return torch.from_numpy(((columns - known.mean(axis=0)) / spread).astype(np.float32))


def _columns(rows: Table) -> Table:
    columns = []
    for position, name in enumerate(_COLUMNS):
        values = rows[:, position]
        if name in _CATEGORIES:
            columns += [values == category for category in _CATEGORIES[name][1:]]
        else:
            columns.append(values)
    return np.stack(columns, axis=1).astype(np.float64)
