"""A data set of one's own: a function, named ``module:function``, that returns examples to train and to test on.

It is called with ``data.options``, and with ``data_dir`` where it has a parameter of that name. It returns

- a :class:`~fedmerge.data.Dataset`,
- four tensors or arrays, ``train_x, train_y, test_x, test_y``,
- two parts, ``train, test``: map-style data sets, or pairs of tensors,
- a mapping with ``train`` and ``test``, as a ``DatasetDict`` of Hugging Face is one, and what else is known:
  ``collate_fn``, ``num_classes``, ``class_names``, ``clients`` (a name or number for every training example),
  ``columns``, ``labels``, ``task``, ``outputs``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.data.dataset import Dataset
from fedmerge.data.example_sets import IGNORED
from fedmerge.errors import DataError, FedMergeError, UnknownName, shown
from fedmerge.lookup.loading import load_named

__all__ = ["as_dataset", "load_own_dataset"]

_KNOWN = (
    "train",
    "test",
    "collate_fn",
    "num_classes",
    "class_names",
    "clients",
    "columns",
    "labels",
    "task",
    "outputs",
)


def load_own_dataset(name: str, data_dir: Path, options: Mapping[str, Any]) -> Dataset:
    """Call the function that ``module:function`` names.

    Raises
    ------
    DataError
        It cannot be imported, fails, or returns something else than a data set.
    UnknownName
        It has no such option.
    """
    function = load_named(name, "data set", "function", "my_data:load", DataError)
    if not callable(function):
        raise DataError(f"data set {name!r} is a {type(function).__name__}: name a function that returns a data set")
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # made in C
        parameters = inspect.signature(lambda **options: None).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        for option in options:
            if option not in parameters:
                known = [parameter for parameter in parameters if parameter != "data_dir"]
                raise UnknownName(f"option of data set {name!r}:", option, known, "" if known else "It takes none.")
    folder = {"data_dir": data_dir} if "data_dir" in parameters and "data_dir" not in options else {}
    try:
        made = function(**folder, **options)
    except FedMergeError:
        raise
    except Exception as error:  # a person's own function may raise anything
        raise DataError(f"data set {name!r}: the function fails ({type(error).__name__}: {error})") from error
    return as_dataset(name, made)


def as_dataset(name: str, made: Any) -> Dataset:
    """A data set of what a function returned, in any form that the head of this module lists.

    Raises
    ------
    DataError
        It has none of these forms.

    Examples
    --------
    >>> x, y = torch.zeros(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> as_dataset("toy", (x, y, x, y))
    Dataset('toy', train=6, test=6, input_shape=(2,), num_classes=3, natural_clients=0)
    >>> as_dataset("wards", {"train": (x, y), "test": (x, y), "clients": list("abcabc")}).client_names
    ('a', 'b', 'c')
    """
    if isinstance(made, Dataset):
        return made
    if isinstance(made, Mapping):
        about = {str(key): value for key, value in made.items()}
    elif isinstance(made, tuple | list) and len(made) == 4:
        about = {"train": tuple(made[:2]), "test": tuple(made[2:])}
    elif isinstance(made, tuple | list) and len(made) == 2:
        about = {"train": made[0], "test": made[1]}
    else:
        raise DataError(
            f"data set {name!r}: the function returned {shown(made, 60)}: return (train, test), "
            '(train_x, train_y, test_x, test_y), or a mapping with "train" and "test"'
        )
    missing = [part for part in ("train", "test") if about.get(part) is None]
    if missing:
        raise DataError(f"data set {name!r}: the function returned no {' and no '.join(map(repr, missing))} part")
    if "validation" in about and "validation" not in _KNOWN:
        del about["validation"]  # a third part that many data sets have
    for key in about:
        if key not in _KNOWN:
            raise UnknownName(f"part of data set {name!r}:", key, _KNOWN)
    return _made(name, about)


def _made(name: str, about: Mapping[str, Any]) -> Dataset:
    settings: dict[str, Any] = {
        key: about[key] for key in ("collate_fn", "columns", "task", "outputs") if about.get(key) is not None
    }
    for part in ("train", "test"):
        examples = about[part]
        if _pair(examples):
            settings |= {f"{part}_x": examples[0], f"{part}_y": examples[1]}
        else:
            settings[f"{part}_set"] = examples
    clients = about.get("clients")
    if clients is not None:
        settings["train_client"], settings["client_names"] = _clients(name, clients)
    if about.get("labels") is not None:
        settings["labels"] = torch.as_tensor(about["labels"])
    settings["class_names"] = tuple(map(str, about.get("class_names") or ()))
    classes = about.get("num_classes") or len(settings["class_names"])
    if not classes and about.get("task") in (None, "", "classification", "language_model"):
        classes = _classes(Dataset(name, **settings))
    return Dataset(name, num_classes=classes, **settings)


def _pair(value: Any) -> bool:
    """Whether this is inputs and labels in memory."""
    return isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], Tensor | np.ndarray)


def _classes(dataset: Dataset) -> int:
    """Classes that the labels name; 0 where they are numbers to be regressed on."""
    first = dataset.example[1]
    if first.is_floating_point():
        return 0
    labels = dataset.train_labels
    if dataset.test.tensors is not None:
        labels = torch.cat((labels.flatten(), dataset.test.tensors[1].flatten()))
    counted = labels[labels != IGNORED]
    if len(counted) and int(counted.min()) < 0:
        raise DataError(
            f"data set {dataset.name!r}: labels go down to {int(counted.min())}: number classes from 0, and mark what "
            f"does not examples by {IGNORED}"
        )
    return int(counted.max()) + 1 if len(counted) else 0


def _clients(name: str, clients: Any) -> tuple[Tensor, tuple[str, ...]]:
    array = clients.cpu().numpy() if isinstance(clients, Tensor) else np.asarray(clients)
    if array.ndim != 1 or array.dtype.kind not in "iubUO":
        raise DataError(f"data set {name!r}: clients are {shown(clients, 60)}: give a name or number for every example")
    if array.dtype.kind == "O":
        array = array.astype(str)
    values, numbers = np.unique(array, return_inverse=True)
    return torch.from_numpy(numbers.reshape(-1).astype(np.int64)), tuple(map(str, values.tolist()))
