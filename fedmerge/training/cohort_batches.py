"""The batches of many clients, step by step: the same rows that each would draw alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.data.client_data import examples_of
from fedmerge.data.example_sets import IGNORED, Examples
from fedmerge.errors import CannotStack, InvalidOption
from fedmerge.state import State
from fedmerge.tasks import Regression, Task
from fedmerge.tasks.label_shapes import check_classes
from fedmerge.training.local_training import LocalTraining

__all__ = ["CohortBatches", "Participant", "check_participants", "count_steps"]

_SMALL_ROW = 32
_NUMPY_TYPES = (torch.float32, torch.float64, torch.float16, torch.uint8, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Participant:
    """One client of a cohort.

    Parameters
    ----------
    client
        Names the client's random streams, as in `fedmerge.training.train`.
    x, y
        Inputs [n, ...] and labels [n] or [n, T]; or, without `y`, examples in another form, see
        :class:`~fedmerge.data.ClientData`, which train one client after the other.
    offset
        What the method adds to this client's gradients, by the names of parameters.
    held_out
        Examples that early stopping judges by.
    start
        Tensors that this client starts from in place of the model's, by name: its personal part.

    Attributes
    ----------
    data : Examples
        The same in any form; where they are not in memory, `x` and `y` are None.

    Raises
    ------
    DataError
        The examples cannot be used, see :class:`~fedmerge.data.ClientData`.

    Examples
    --------
    >>> Participant(3, torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)).client
    3
    """

    client: int
    x: Any
    y: Any = None
    offset: State = field(default_factory=dict)
    held_out: Examples | None = None
    start: State = field(default_factory=dict)
    data: Examples = field(init=False)

    def __post_init__(self) -> None:
        data = examples_of(self.x, self.y, f"client {self.client}")
        x, y = data.tensors or (None, None)
        for name, value in (("data", data), ("x", x), ("y", y)):
            object.__setattr__(self, name, value)

    @property
    def together(self) -> bool:
        """Whether they may train stacked with those of others: a tensor of inputs, a tensor of labels."""
        return isinstance(self.x, Tensor)


def count_steps(examples: int, settings: LocalTraining) -> int:
    """Optimiser steps of a client.

    Examples
    --------
    >>> count_steps(25, LocalTraining(epochs=2, batch_size=10))
    6
    """
    return settings.steps_of(examples)


def check_participants(participants: Sequence[Participant]) -> None:
    """Refuse a cohort without clients or examples, and one whose examples do not fit into one tensor.

    Raises
    ------
    InvalidOption
        There are no participants, or one has no examples.
    CannotStack
        Their examples differ in shape or type.
    """
    if not participants:
        raise InvalidOption("there are no participants to train")
    for participant in participants:
        if not participant.together:
            how = "read batch by batch" if participant.x is None else "several tensors"
            raise CannotStack(f"the examples of client {participant.client} are {how}")
    first = participants[0]
    shapes = first.x.shape[1:], first.y.shape[1:]
    for participant in participants:
        if participant.x.shape[0] == 0:
            raise InvalidOption(f"client {participant.client} has no examples to train on")
        if participant.x.dtype != first.x.dtype or participant.y.dtype != first.y.dtype:
            raise CannotStack(
                f"examples of client {participant.client} are {participant.x.dtype} and {participant.y.dtype}, "
                f"those of client {first.client} {first.x.dtype} and {first.y.dtype}"
            )
        if (participant.x.shape[1:], participant.y.shape[1:]) != shapes:
            raise CannotStack(
                f"examples of client {participant.client} have shapes {[*participant.x.shape[1:]]} and "
                f"{[*participant.y.shape[1:]]}, those of client {first.client} "
                f"{[*first.x.shape[1:]]} and {[*first.y.shape[1:]]}"
            )


class CohortBatches:
    """All batches of participants that are sorted by their steps, those with the most first.

    `sizes` [K, steps] tells how many rows a client's batch has, 0 where it has finished: at any step those still at
    work come first. Labels are those of `task`, of classes where there is none.
    """

    def __init__(
        self,
        participants: Sequence[Participant],
        settings: LocalTraining,
        draws: Iterable[np.random.Generator],
        device: torch.device,
        task: Task | None = None,
    ) -> None:
        self.task, self.participants = task, participants
        self._device = device
        self._x = _Rows([participant.x for participant in participants])
        self._y = _Rows([participant.y for participant in participants])
        self.rows, self.sizes = _draw(participants, settings, draws)

    def check_classes(self, classes: int) -> None:
        """Make sure that all labels are classes, or to be ignored.

        Raises
        ------
        InvalidOption
            One client's are not.
        """
        if self._y.within(classes):
            return
        for participant in self.participants:
            check_classes(participant.y, classes, f"client {participant.client}")

    @property
    def steps(self) -> int:
        """Steps of the longest."""
        return int(self.sizes.shape[1])

    def at(self, step: int, members: slice | NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs [k, b, ...], labels [k, b, ...] and the labels' weights at one step of some clients.

        The weights sum to one for each client; they are None where all are equal. Where sizes differ, rows that a
        client does not have are copies of its first example, of weight zero.
        """
        sizes = self.sizes[members, step]
        most = int(sizes.max())
        rows = self.rows[members, step, :most]
        x, y = self._x.take(members, rows), self._y.take(members, rows)
        weights: Tensor | None = None
        # Among numbers to be regressed -100 is one like others.
        ignored = torch.zeros_like(y, dtype=torch.bool) if isinstance(self.task, Regression) else y == IGNORED
        if sizes.min() < most or bool(ignored.any()):
            present = torch.from_numpy(np.arange(most) < sizes[:, None]).to(y.device)
            present = present.reshape(present.shape + (1,) * (y.ndim - 2)) & ~ignored
            # A client may have nothing but padding in a batch: then its loss is 0.
            counts = present.flatten(1).sum(1).clamp(min=1).reshape(-1, *[1] * (y.ndim - 1))
            weights = (present.double() / counts).to(self._device)
        return x.to(self._device), y.to(self._device), weights


class _Rows:
    """The examples of several clients, from which to take rows of each."""

    def __init__(self, sources: list[Tensor]) -> None:
        first = sources[0]
        # Small rows, such as labels: one array of all, and one call for all clients. Large rows are copied once only.
        self._joined = first[0].numel() <= _SMALL_ROW or first.device.type != "cpu" or first.dtype not in _NUMPY_TYPES
        if self._joined:
            self._all = torch.cat(sources)
            self._starts = np.cumsum([0, *(len(source) for source in sources[:-1])])[:, None]
        else:
            self._shape, self._dtype = first.shape[1:], first.dtype
            self._arrays = [source.detach().contiguous().numpy() for source in sources]

    def within(self, classes: int) -> bool:
        """Whether all numbers are from 0 up to `classes`, without it."""
        parts = [self._all] if self._joined else [torch.from_numpy(array) for array in self._arrays]
        return all(int(part.min()) >= 0 and int(part.max()) < classes for part in parts)

    def take(self, members: slice | NDArray[np.int64], rows: NDArray[np.int64]) -> Tensor:
        """Rows [k, b, ...] of some of the clients, given by their numbers [k, b]."""
        if self._joined:
            index = torch.from_numpy(rows + self._starts[members])
            return self._all[index.to(self._all.device)]
        chosen = self._arrays[members] if isinstance(members, slice) else [self._arrays[i] for i in members]
        out = torch.empty(*rows.shape, *self._shape, dtype=self._dtype)
        # NumPy's take costs half of what torch's does here; any mode but "raise" spares it a copy of the result.
        for target, source, wanted in zip(out.numpy(), chosen, rows, strict=True):
            source.take(wanted, 0, target, "clip")
        return out


def _draw(
    participants: Sequence[Participant], settings: LocalTraining, draws: Iterable[np.random.Generator]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows [K, steps, batch] of every batch, padded with zeros, and how many each has."""
    epochs, steps = settings.length
    batch = settings.batch_size
    most = count_steps(len(participants[0].x), settings)
    batch = min(batch, max(len(participant.x) for participant in participants))
    rows = np.zeros((len(participants), most, batch), dtype=np.int64)
    sizes = np.zeros((len(participants), most), dtype=np.int64)
    for table, size, participant, rng in zip(rows, sizes, participants, draws, strict=True):
        n = len(participant.x)
        each = -(-n // settings.batch_size)
        last = n - (each - 1) * batch
        end = steps or (epochs or 0) * each
        for start in range(0, end, each):
            order = rng.permutation(n)
            stop = min(start + each, end)
            size[start:stop] = batch
            if stop == start + each:
                size[stop - 1] = last
            table[start:stop].reshape(-1)[:n] = order[: (stop - start) * batch]
    return rows, sizes
