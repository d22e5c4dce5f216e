"""Training examples that a pretrained base has seen: they stand in the base's file, and no client is given them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.data.dataset import Dataset
from fedmerge.errors import ConfigError, InvalidOption, ModelError
from fedmerge.seeding import generator

__all__ = ["base_metadata", "rows_for_base", "withheld_rows"]

KEY = "fedmerge.base"


def rows_for_base(dataset: Dataset, share: float, classes: Sequence[int], seed: int) -> Tensor:
    """Rows of the training examples that a base is trained on, drawn by `seed`, sorted.

    Parameters
    ----------
    dataset
        The data set.
    share
        Of the examples, or of those of the `classes`; above 0 and at most 1, less where there are no `classes`.
    classes
        Labels that the base gets to see; all where empty.

    Raises
    ------
    InvalidOption
        The share is out of range, leaves no example to the base or none to the clients; or a class is not there.

    Examples
    --------
    >>> labels = torch.tensor([0, 1, 2, 0, 1, 2])
    >>> data = Dataset("toy", torch.zeros(6, 1), labels, torch.zeros(3, 1), labels[:3], num_classes=3)
    >>> rows_for_base(data, 1.0, [0, 2], seed=0)
    tensor([0, 2, 3, 5])
    """
    if not 0 < share <= 1:
        raise InvalidOption(f"share = {share}: the base's share of the examples must be above 0 and at most 1")
    rows = torch.arange(len(dataset.train))
    if classes:
        labels = dataset.train_labels
        if labels.ndim != 1 or labels.is_floating_point():
            raise InvalidOption(f"classes: the examples of {dataset.name!r} have no class each: use a share")
        absent = [label for label in classes if not bool((labels == label).any())]
        if absent:
            raise InvalidOption(f"classes: no training example of {dataset.name!r} has label {absent[0]}")
        rows = rows[torch.isin(labels, torch.tensor(list(classes)))]
    number = round(share * len(rows))
    if number == 0 or number == len(dataset.train):
        who = "the base" if number == 0 else "the clients"
        raise InvalidOption(f"share = {share} leaves none of the {len(rows)} examples to {who}: choose another")
    drawn = generator(seed, "examples of the base").permutation(len(rows))[:number]
    return rows[torch.from_numpy(np.sort(drawn))]


def base_metadata(dataset: Dataset, rows: Tensor, base_facts: Mapping[str, Any]) -> dict[str, str]:
    """What a base's file says about its training, the rows included; `told` is for people who read it."""
    mask = np.zeros(len(dataset.train), dtype=bool)
    mask[rows.numpy()] = True
    packed = base64.b64encode(np.packbits(mask).tobytes()).decode()
    facts = {**base_facts, "data_set": dataset.name, "examples": len(rows), "rows": packed, **_identity(dataset)}
    return {"format": "pt", KEY: json.dumps(facts)}


def withheld_rows(metadata: Mapping[str, str], dataset: Dataset, where: str) -> Tensor | None:
    """Rows of `dataset` that the base was trained on; None where that was other data, or nothing is told of it.

    Parameters
    ----------
    metadata
        Of the base's file.
    dataset
        What clients are to share.
    where
        The file, for errors.

    Raises
    ------
    ConfigError
        The base was trained on a data set of that name that had other examples.
    ModelError
        What the file says cannot be read.

    Examples
    --------
    >>> labels = torch.tensor([0, 1, 0, 1])
    >>> data = Dataset("toy", torch.zeros(4, 1), labels, torch.zeros(2, 1), labels[:2], num_classes=2)
    >>> withheld_rows(base_metadata(data, torch.tensor([1, 2]), {}), data, "base.safetensors")
    tensor([1, 2])
    """
    if KEY not in metadata:
        return None
    try:
        facts = json.loads(metadata[KEY])
        name, total, labels = str(facts["data_set"]), int(facts["total"]), str(facts["labels"])
        bits = np.frombuffer(base64.b64decode(facts["rows"], validate=True), dtype=np.uint8)
        rows = torch.from_numpy(np.flatnonzero(np.unpackbits(bits, count=total)))
        if len(bits) != (total + 7) // 8 or len(rows) != facts["examples"]:
            raise ValueError("the rows are not as many as it says")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{where}: what it says about its training cannot be read ({error}): make it anew with `fedmerge pretrain`"
        ) from error
    if {"total": total, "labels": labels} == _identity(dataset):
        return rows
    if name == dataset.name:
        raise ConfigError(
            f"{where} was trained on {len(rows)} of {total} examples of {name!r}, which has {len(dataset.train)} here, "
            "or other labels: give data.options as then, make the base anew, or say data.withhold = false, and clients "
            "may hold what the base has seen"
        )
    return None


def _identity(dataset: Dataset) -> dict[str, Any]:
    """By what a data set is known again: the number of its training examples and their labels."""
    labels = dataset.train_labels.contiguous().cpu().numpy().tobytes()
    return {"total": len(dataset.train), "labels": hashlib.sha256(labels).hexdigest()}
