"""The data sets by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedmerge.data.dataset import Dataset
from fedmerge.data.own_dataset import as_dataset, load_own_dataset
from fedmerge.data.table import ENDINGS, is_table, load_table
from fedmerge.errors import DataError, UnknownName
from fedmerge.registry import entries, registered

__all__ = ["WITH_NATURAL_CLIENTS", "dataset_names", "load_dataset", "suggested_settings"]

_KNOWN = ("digits", "mnist", "fashion_mnist", "cifar10", "shakespeare", "heart_disease", "table")
WITH_NATURAL_CLIENTS = ("heart_disease", "shakespeare")


# How data sets that come with clients of their own are usually divided, and which model fits their inputs.
_SUGGESTED: dict[str, dict[str, dict[str, Any]]] = {
    "shakespeare": {"partition": {"scheme": "natural", "clients": 20}, "model": {"name": "char_lstm"}},
    "heart_disease": {"partition": {"scheme": "natural"}, "model": {"name": "logistic"}},
}


def suggested_settings(name: str) -> dict[str, dict[str, Any]]:
    """Settings of partition and model that suit a data set better than the general defaults.

    Examples
    --------
    >>> suggested_settings("heart_disease")["partition"]["scheme"]
    'natural'
    """
    return _SUGGESTED.get(name, {})


def dataset_names() -> list[str]:
    """Names that `load_dataset` knows, those that other packages register last.

    Examples
    --------
    >>> "digits" in dataset_names()
    True
    """
    return [*_KNOWN, *(name for name in entries("data set") if name not in _KNOWN)]


def load_dataset(name: str, data_dir: Path | None = None, **options: Any) -> Dataset:
    """Load a data set into memory.

    Parameters
    ----------
    name : str
        One of `dataset_names()`; a table's file, see :func:`~fedmerge.data.table.load_table`; or ``module:function``,
        see :mod:`fedmerge.data.own_dataset`.
    data_dir : Path, optional
        Folder of the data files. By default the environment variable FEDMERGE_DATA, or else
        `~/.cache/fedmerge`.
    **options
        Options of that data set: `shakespeare` takes `sequence_length`, `min_characters`, `max_clients`.

    Raises
    ------
    UnknownName
        For an unknown data set or option.
    InvalidOption
        For an option out of its range.
    DataError
        Where the folder or its files are missing or unreadable, or a library is not installed.

    Examples
    --------
    >>> load_dataset("digits")
    Dataset('digits', train=1437, test=360, input_shape=(1, 8, 8), num_classes=10, natural_clients=0)
    """
    if is_table(name):
        _check_options(name, load_table, options)
        return load_table(_data_folder(data_dir), **{"file": name, **options})
    if ":" in name:
        return load_own_dataset(name, _data_folder(data_dir), options)
    reader = registered("data set", name)
    if reader is None:
        raise UnknownName("data set", name, dataset_names(), f"A file of your own ends in {', '.join(ENDINGS)}.")
    _check_options(name, reader.cls, options)
    return as_dataset(name, reader.cls(_data_folder(data_dir), **options))


def _check_options(name: str, loader: Callable[..., Any], options: Mapping[str, Any]) -> None:
    _, *known = inspect.signature(loader).parameters
    for option in options:
        if option not in known:
            none = "" if known else "It takes none."
            raise UnknownName(f"option of data set {name!r}:", option, known, none)


def _data_folder(data_dir: Path | None) -> Path:
    """The folder to read from; only the default one may be absent, as a download will make it."""
    from_environment = os.environ.get("FEDMERGE_DATA")
    if data_dir is None and not from_environment:
        return Path.home() / ".cache" / "fedmerge"
    folder = Path(data_dir or from_environment or "").expanduser()
    if not folder.is_dir():
        origin = "FEDMERGE_DATA" if data_dir is None else "data_dir"
        raise DataError(
            f"data folder {str(folder)!r} (from {origin}) does not exist or is not a folder. "
            "Create it, or point --data-dir or FEDMERGE_DATA at the folder that holds the data."
        )
    return folder
