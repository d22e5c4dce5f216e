"""Exchanges within one merge: what the server tells clients that keep their model, and what they make of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.errors import ModelError
from fedmerge.permutations.carrying import Plans, carry_line
from fedmerge.permutations.spec import PermutationSpec, reordered
from fedmerge.state import State

__all__ = ["News", "Stage", "catch_up", "reordering"]


@dataclass(frozen=True)
class Stage:
    """What all clients do in one more exchange within a merge.

    Parameters
    ----------
    number
        Of the stage, from 1; batches are drawn anew in each.
    frozen
        Names of parameters that are not trained.
    epochs
        Passes over a client's examples.
    send
        Names of the tensors that come back; clients keep the rest.
    last
        Whether clients may forget their model afterwards.
    """

    number: int
    frozen: tuple[str, ...]
    epochs: int
    send: tuple[str, ...]
    last: bool = False


@dataclass(frozen=True)
class News:
    """What one client needs to go on with the model that it has kept.

    Parameters
    ----------
    settled
        Tensors that are merged, since the last time it heard.
    sources
        For a tensor and an axis of it, which of its slices stands at each new place; -1 is a slice of zeros. Of the
        columns of a grouped convolution, those of all its groups are counted, see
        :func:`~fedmerge.permutations.spec.reordered`.
    """

    settled: State
    sources: Mapping[tuple[str, int], Tensor]


def catch_up(state: State, news: News) -> dict[str, Tensor]:
    """The model that a client goes on with: its own tensors re-ordered, those that are merged in their place.

    Raises
    ------
    ModelError
        The news tell of tensors or slices that the state does not have.

    Examples
    --------
    >>> news = News({"1.bias": torch.zeros(1)}, {("0.weight", 0): torch.tensor([1, -1, 0])})
    >>> catch_up({"0.weight": torch.tensor([[2.0], [3.0]]), "1.bias": torch.ones(1)}, news)["0.weight"].ravel()
    tensor([3., 0., 2.])
    """
    caught = dict(state)
    for (name, axis), index in news.sources.items():
        if name not in caught or not _fits(index, caught[name], axis):
            raise ModelError(
                f"{name!r} cannot be re-ordered along axis {axis}: the client has kept another model than the "
                "server means. Clients must keep their Context between the messages of a round."
            )
        if int(index.max()) >= caught[name].shape[axis]:
            caught[name] = reordered(caught[name], axis, index)
            continue
        taken = caught[name].index_select(axis, index.clamp_min(0).to(caught[name].device))
        shape = [1] * taken.ndim
        shape[axis] = -1
        caught[name] = torch.where((index >= 0).reshape(shape).to(taken.device), taken, torch.zeros_like(taken))
    unknown = sorted(set(news.settled) - set(state))
    if unknown:
        raise ModelError(f"the server has merged {unknown[:3]}, which the model that the client has kept lacks")
    return {**caught, **news.settled}


def _grouped(index: Tensor, tensor: Tensor, axis: int) -> bool:
    """Whether an index is about the columns of a grouped convolution, those of all groups of rows."""
    size = max(1, tensor.shape[axis])
    return axis == 1 and len(index) > size and len(index) % size == 0 and tensor.shape[0] % (len(index) // size) == 0


def _fits(index: Tensor, tensor: Tensor, axis: int) -> bool:
    if not 0 <= axis < tensor.ndim:
        return False
    if int(index.max()) < tensor.shape[axis]:
        return True
    return _grouped(index, tensor, axis) and int(index.min()) >= 0 and int(index.max()) < len(index)


def reordering(
    spec: PermutationSpec, state: State, order: Sequence[Tensor], plans: Plans, without: Collection[str]
) -> dict[tuple[str, int], Tensor]:
    """The ``sources`` of News by which a client carries its tensors over, where anything moves.

    Parameters
    ----------
    spec, state
        Of the client, as they are before.
    order
        Permutations that come first.
    plans
        By group; each new neuron is an old one, or nothing.
    without
        Names of tensors that it is sent anyway.
    """
    found = {}
    for (name, axis), standing in spec.touching.items():
        if name not in state or name in without:
            continue
        planned = [(plans[i], site) for i, site in standing if i in plans]
        numbers = spec.gather((name, axis), order).double() + 1
        index = (carry_line(numbers, planned) if planned else numbers).long() - 1
        if not torch.equal(index, torch.arange(len(numbers))):
            found[name, axis] = index
    for alias, name in spec.aliases.items():
        if alias in state:
            found |= {(alias, axis): index for (other, axis), index in found.items() if other == name}
    return found
