"""From what a data set gives for single examples to a batch ``(inputs, targets)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from fedmerge.data.example_sets import Batch, as_tensor, checked_examples
from fedmerge.errors import DataError, FedMergeError
from fedmerge.inputs import examples_in, tensors_of

__all__ = ["LABELS", "as_batch_of", "collated", "read_rows"]

LABELS = ("label", "labels", "target", "targets", "y")
"""Under which of these names an example that is a mapping has its target."""


def read_rows(dataset: Any, rows: list[int], what: str = "") -> list[Any]:
    """Examples of a map-style data set, several in one call where it can.

    Raises
    ------
    DataError
        One cannot be read; the error names it.

    Examples
    --------
    >>> read_rows("abc", [2, 0])
    ['c', 'a']
    """
    several = getattr(dataset, "__getitems__", None)
    row: object = f"one of {rows[:3]}"
    try:
        if several is not None:
            return list(several(rows))
        examples = []
        for row in rows:
            examples.append(dataset[row])
        return examples
    except FedMergeError:
        raise
    except Exception as error:  # a person's own data set may raise anything
        raise DataError(
            f"{what + ': ' if what else ''}example {row} cannot be read: {type(error).__name__}: {error}"
        ) from error


def collated(examples: list[Any]) -> Any:
    """A batch, as torch's DataLoader makes it; arrays of float64 become torch's default dtype, as models have it.

    Examples
    --------
    >>> collated([(np.zeros(2), 1), (np.ones(2), 0)])[0].dtype
    torch.float32
    """
    return default_collate([_in_usual_numbers(example) for example in examples])


def as_batch_of(batch: Any, what: str = "", rows: NDArray[np.int64] | None = None) -> Batch:
    """Inputs and targets of a batch.

    A pair is ``(inputs, targets)``; of a longer tuple the last is the target and the others the inputs. Of a mapping
    the target is what it has under a name in :data:`LABELS`; the rest are the inputs, alone or as a mapping.

    Parameters
    ----------
    batch
        What a collation, or a function of batches, gave.
    what
        Whose it is, in front of an error.
    rows
        Which examples these are.

    Raises
    ------
    DataError
        It has another form, or the numbers in it are unusable.

    Examples
    --------
    >>> as_batch_of({"pixels": torch.zeros(2, 3), "label": torch.tensor([1, 0])})[0].shape
    torch.Size([2, 3])
    """
    front = f"{what}: " if what else ""
    if isinstance(batch, Mapping):
        inputs, targets = _parted(batch, front)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        *several, targets = batch
        inputs = several[0] if len(several) == 1 else tuple(several)
    else:
        description = f"a {type(batch).__name__}" + (
            f" of {len(batch)} part" if isinstance(batch, tuple | list) else ""
        )
        raise DataError(
            f"{front}a batch is {description}: examples are pairs (inputs, target), or mappings with a {LABELS[0]!r}; "
            "pass a collate_fn that makes (inputs, targets) of a list of examples"
        )
    if isinstance(inputs, Tensor | np.ndarray):
        return checked_examples(inputs, targets, what, rows)
    return _nest(inputs, targets, what)


def _nest(inputs: Any, targets: Any, what: str) -> Batch:
    """Several inputs, among which there may be what is not one for each example: masks, names, nothing."""
    inputs = _with_tensors(inputs)
    front = f"{what}: " if what else ""
    tensors = tensors_of(inputs)
    if not tensors:
        raise DataError(f"{front}the inputs of a batch are a {type(inputs).__name__} without any tensor in it")
    if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in tensors):
        raise DataError(f"{front}inputs hold NaN: leave these examples out, or fill them in (torch.nan_to_num)")
    _, targets = checked_examples(torch.zeros(examples_in(inputs), 1, 1), targets, what)
    return inputs, targets


def _with_tensors(inputs: Any) -> Any:
    """The same nest, lists in it as tuples and arrays as tensors."""
    if isinstance(inputs, np.ndarray):
        return as_tensor(inputs, "inputs")
    if isinstance(inputs, tuple | list) and not hasattr(inputs, "_fields"):
        return tuple(map(_with_tensors, inputs))
    if type(inputs) is dict:
        return {key: _with_tensors(part) for key, part in inputs.items()}
    return inputs  # of a class of its own, which the model knows


def _parted(batch: Mapping[Any, Any], front: str) -> tuple[Any, Any]:
    label_keys = [name for name in LABELS if name in batch]
    if len(label_keys) != 1:
        which = "none" if not label_keys else " and ".join(map(repr, label_keys))
        raise DataError(
            f"{front}an example is a mapping with {', '.join(map(repr, batch))}, of which {which} names a target: use "
            f"one of {', '.join(LABELS)}, or pass a collate_fn that makes (inputs, targets) of a list of examples"
        )
    inputs = {name: part for name, part in batch.items() if name != label_keys[0]}
    return (next(iter(inputs.values())) if len(inputs) == 1 else inputs), batch[label_keys[0]]


def _in_usual_numbers(example: Any) -> Any:
    if isinstance(example, np.ndarray | np.float64) and example.dtype == np.float64:
        return torch.as_tensor(example, dtype=torch.get_default_dtype())
    if isinstance(example, Mapping):
        return {key: _in_usual_numbers(part) for key, part in example.items()}
    if isinstance(example, tuple | list) and not hasattr(example, "_fields"):
        return type(example)(_in_usual_numbers(part) for part in example)
    return example
