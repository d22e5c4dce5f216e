"""Further exchanges within one merge: what the server tells clients that keep their model, and what they make of it.

Methods that merge layer by layer (FedMA) need them. After a layer is merged, each client gets the merged layer, puts
its own remaining tensors into the merged order of neurons, and trains on.
"""

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
    """What all clients do in one further exchange of a merge.

    Parameters
    ----------
    number
        Number of the stage, from 1. Every stage draws batches of its own.
    frozen
        Names of parameters that are not trained in it.
    epochs
        Passes over a client's examples.
    send
        Names of the tensors that clients send back. They keep the others.
    last
        Whether this is the last stage, after which clients may forget their model.
    """

    number: int
    frozen: tuple[str, ...]
    epochs: int
    send: tuple[str, ...]
    last: bool = False


@dataclass(frozen=True)
class News:
    """What one client has to be told before it goes on with the model that it kept.

    Parameters
    ----------
    settled
        The tensors that the server has merged since the client's last exchange.
    sources
        How to re-order the client's other tensors. By name and axis, for each new place the index of the slice that
        goes there; -1 stands for a slice of zeros. The columns of a grouped convolution are numbered through all
        groups, see :func:`~fedmerge.permutations.spec.reordered`.
    """

    settled: State
    sources: Mapping[tuple[str, int], Tensor]


def catch_up(state: State, news: News) -> dict[str, Tensor]:
    """The model that a client goes on with: its own tensors re-ordered, then the merged ones put in.

    Raises
    ------
    ModelError
        The news name tensors or slices that `state` does not have.

    Examples
    --------
    >>> news = News({"1.bias": torch.zeros(1)}, {("0.weight", 0): torch.tensor([1, -1, 0])})
    >>> catch_up({"0.weight": torch.tensor([[2.0], [3.0]]), "1.bias": torch.ones(1)}, news)["0.weight"].ravel()
    tensor([3., 0., 2.])
    """
    current = dict(state)
    for (name, axis), index in news.sources.items():
        if name not in current or not _fits(index, current[name], axis):
            raise ModelError(
                f"{name!r} cannot be re-ordered along axis {axis}: the client has kept another model than the "
                "server means. Clients must keep their Context between the messages of a round."
            )
        if int(index.max()) >= current[name].shape[axis]:
            current[name] = reordered(current[name], axis, index)
            continue
        taken = current[name].index_select(axis, index.clamp_min(0).to(current[name].device))
        shape = [1] * taken.ndim
        shape[axis] = -1
        current[name] = torch.where((index >= 0).reshape(shape).to(taken.device), taken, torch.zeros_like(taken))
    unknown = sorted(set(news.settled) - set(state))
    if unknown:
        raise ModelError(f"the server has merged {unknown[:3]}, which the model that the client has kept lacks")
    return {**current, **news.settled}


def _grouped(index: Tensor, tensor: Tensor, axis: int) -> bool:
    """Whether an index numbers the columns of a grouped convolution through all its groups."""
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
    """The ``sources`` of :class:`News` that bring a client's tensors into the merged order of neurons.

    Axes along which nothing moves are left out.

    Parameters
    ----------
    spec, state
        The symmetries and the tensors of the client's model, before anything moves.
    order
        Permutations by group, which are done first.
    plans
        Then, by group, which old neuron becomes each new one, if any does.
    without
        Names of tensors that the client is sent anyway.
    """
    sources = {}
    for (name, axis), standing in spec.touching.items():
        if name not in state or name in without:
            continue
        planned = [(plans[i], site) for i, site in standing if i in plans]
        # Numbered from 1, so that 0, which a new neuron without an old one gets, means nobody.
        numbers = spec.gather((name, axis), order).double() + 1
        index = (carry_line(numbers, planned) if planned else numbers).long() - 1
        if not torch.equal(index, torch.arange(len(numbers))):
            sources[name, axis] = index
    for alias, name in spec.aliases.items():
        if alias in state:
            sources |= {(alias, axis): index for (first, axis), index in sources.items() if first == name}
    return sources
