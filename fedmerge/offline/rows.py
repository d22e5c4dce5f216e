"""Models whose vocabularies or classes differ: rows that several have are merged, rows of one are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption, UnknownName, shown
from fedmerge.merging import Pipeline
from fedmerge.offline.arguments import one_each
from fedmerge.state import State, is_number
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Label", "RowLabels", "check_rows", "joined_labels", "merged_rows", "row_labels"]

Label = str | int
"""What a row of a tensor stands for: a word, a token's text, a class."""

RowLabels = Mapping[str, Sequence[Sequence[Label]]]
"""By tensor, what the rows of each model's stand for."""


def joined_labels(labels: Iterable[Iterable[Label]]) -> list[Label]:
    """All labels: those of the first model in its order, then what each other model has besides.

    It is what the rows of a merged tensor stand for.

    Examples
    --------
    >>> joined_labels([["the", "cat"], ["the", "dog"]])
    ['the', 'cat', 'dog']
    """
    return list(dict.fromkeys(label for each in labels for label in each))


def row_labels(value: Any, states: Sequence[State], tied: Mapping[str, str]) -> dict[str, list[tuple[Label, ...]]]:
    """The labels of rows by tensor, under the first name of a shared one.

    Raises
    ------
    InvalidOption
        They do not fit the tensors' rows.
    UnknownName
        No tensor is called so.
    """
    if not isinstance(value, Mapping):
        raise InvalidOption(
            f'rows must be labels by tensor, such as {{"embed.weight": [words_a, words_b]}}, got {shown(value)}'
        )
    by_tensor: dict[str, list[tuple[Label, ...]]] = {}
    for name, each in value.items():
        if name not in states[0]:
            raise UnknownName("tensor in rows", str(name), list(states[0]))
        labels = [tuple(_listed(name, i, own)) for i, own in enumerate(one_each(f"rows[{name!r}]", each, len(states)))]
        for i, (own, state) in enumerate(zip(labels, states, strict=True)):
            _check_labels(f"rows[{name!r}][{i}]", own, state.get(name))
        first = tied.get(name, name)
        if by_tensor.setdefault(first, labels) != labels:
            raise InvalidOption(f"rows: {name!r} and {first!r} are one tensor, and their labels differ")
    return by_tensor


def _listed(name: str, model: int, labels: Any) -> list[Label]:
    if isinstance(labels, str | bytes) or not isinstance(labels, Iterable):
        raise InvalidOption(f"rows[{name!r}][{model}] must be a list of labels, one a row, got {shown(labels)}")
    return list(labels)


def _check_labels(where: str, labels: Sequence[Any], tensor: Tensor | None) -> None:
    strange = [label for label in labels if isinstance(label, bool) or not isinstance(label, str | int)]
    if strange:
        raise InvalidOption(f"{where}: labels are texts or whole numbers, got {shown(strange[0])}")
    if tensor is None or not tensor.ndim or not is_number(tensor):
        raise InvalidOption(f"{where}: the model has no such tensor with rows of numbers")
    if len(labels) != len(tensor):
        raise InvalidOption(f"{where} has {len(labels)} labels for {len(tensor)} rows: one each")
    if len(set(labels)) < len(labels):
        twice = next(label for i, label in enumerate(labels) if label in labels[:i])
        raise InvalidOption(f"{where}: two rows are labelled {twice!r}: each label once")


def check_rows(method: str, pipeline: Pipeline) -> None:
    """Make sure that a method needs nothing but tensors, for nothing else is known of single rows.

    Raises
    ------
    InvalidOption
        It does.
    """
    aggregator = pipeline.aggregator
    wanted = None
    if pipeline.needs:
        wanted = f"what clients measure ({', '.join(pipeline.needs)})"
    elif aggregator.requires_base or pipeline.edits:
        wanted = "the model that all started from"
    elif aggregator.requires_data:
        wanted = "data on the server"
    if wanted:
        raise InvalidOption(
            f"rows= merges rows that models have in common, of which only their tensors are known, and {method} needs "
            f"{wanted}: take a method that needs nothing besides, such as fedavg or slerp, or leave the tensors out"
        )


def merged_rows(
    pipeline: Pipeline,
    name: str,
    tensors: Sequence[Tensor],
    labels: Sequence[Sequence[Label]],
    weights: Sequence[float],
    context: MergeContext,
) -> Tensor:
    """Merge one tensor of several models row by row, by what its rows stand for.

    Rows that the same models have are merged together. A row whose models all have weight 0 is the first one's.

    Parameters
    ----------
    name, tensors
        One a model, ``[rows, ...]``.
    labels
        One a row.
    weights
        One a model.

    Returns
    -------
    Tensor
        ``[rows of all, ...]``, in the order of :func:`joined_labels`.

    Raises
    ------
    InvalidOption
        The tensors differ in more than their rows.
    """
    for i, tensor in enumerate(tensors):
        if tensor.shape[1:] != tensors[0].shape[1:]:
            raise InvalidOption(
                f"rows: {name!r} has rows of shape {list(tensor.shape[1:])} in models[{i}], and "
                f"{list(tensors[0].shape[1:])} in models[0]: only how many there are may differ"
            )
    places = [{label: row for row, label in enumerate(each)} for each in labels]
    joined = joined_labels(labels)
    by_owners: dict[tuple[int, ...], list[int]] = {}
    for row, label in enumerate(joined):
        owners = tuple(i for i, place in enumerate(places) if label in place)
        by_owners.setdefault(tuple(i for i in owners if weights[i]) or owners[:1], []).append(row)
    merged = tensors[0].new_empty((len(joined), *tensors[0].shape[1:]))
    for owners, rows in by_owners.items():
        own = [
            tensors[i][torch.tensor([places[i][joined[row]] for row in rows], device=tensors[i].device)] for i in owners
        ]
        value = own[0]
        if len(owners) > 1:
            sent = [ClientUpdate(i, {name: t}, weights[i]) for i, t in zip(owners, own, strict=True)]
            there = replace(context, base=None, frozen=frozenset(), tied={}, layout=None, model_fn=None)
            value = pipeline.merge(sent, there, buffers=()).state[name]
        merged[torch.tensor(rows, device=merged.device)] = value.to(merged)
    return merged
