"""Where the models of a cohort grow: tensors with a row for each client, filled some clients at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedmerge.training.local_training import LocalTraining
from fedmerge.training.stack import Stack, slots

__all__ = ["CohortStates"]


class CohortStates:
    """The tensors of all clients, written chunk by chunk.

    Parameters
    ----------
    model
        The model that they start from.
    count
        Number of clients.
    own
        For each client, tensors that it starts from in place of the model's, by name; none where all start alike.
    """

    def __init__(self, model: nn.Module, count: int, own: Sequence[Mapping[str, Tensor]] = ()) -> None:
        self._model, self._count = model, count
        self.start = {name: p.detach() for name, p in model.named_parameters()}
        self._weights = {name for name, p in model.named_parameters() if p.requires_grad}
        self._buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
        self.device = next(iter(self.start.values())).device
        self._own, apart = own, {name for tensors in own for name in tensors}
        # A frozen parameter that each client has to itself goes along as buffers do, and stays as it is.
        self._buffers |= {name: p for name, p in self.start.items() if name in apart - self._weights}
        moving = {**{name: self.start[name] for name in self._weights}, **self._buffers}
        self._all = {name: t.new_empty(count, *t.shape) for name, t in moving.items()}

    def stack(
        self,
        rows: list[int],
        settings: LocalTraining,
        transposed: Collection[str] = (),
        offsets: Sequence[Mapping[str, Tensor]] = (),
        *,
        pulled: bool = False,
    ) -> Stack:
        """The start of some clients, in place where their rows follow each other.

        Those `transposed` look the same and lie in memory the other way round. `offsets` of the clients, where they
        have any, go beside them; and where they started, if they are `pulled` there.
        """
        place = _span(rows)
        own = [self._own[row] for row in rows] if any(self._own) else []

        def copies(name: str, tensor: Tensor) -> Tensor:
            if name in transposed:
                room = tensor.new_empty(len(rows), *tensor.shape[::-1]).copy_(tensor.T).mT
            else:
                room = self._all[name][place] if place else tensor.new_empty(len(rows), *tensor.shape)
                room.copy_(tensor)
            for row, mine in enumerate(own):
                if name in mine:
                    room[row].copy_(mine[name])
            return room

        weights = {name: copies(name, tensor) for name, tensor in self.start.items() if name in self._weights}
        buffers = {name: copies(name, tensor) for name, tensor in self._buffers.items()}
        origins: dict[str, Tensor] = {}
        if pulled:
            origins = {name: weights[name].clone() for name in weights if any(name in mine for mine in own)}
        return Stack(weights, buffers, slots(settings, weights), self._stacked(offsets), origins)

    def _stacked(self, offsets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What is added to the clients' gradients, zero for those that have nothing."""
        stacked = {}
        for name in self._weights & {name for offset in offsets for name in offset}:
            weight = self.start[name]
            stacked[name] = torch.stack([offset.get(name, torch.zeros_like(weight)).to(weight) for offset in offsets])
        return stacked

    def put(self, rows: list[int], stack: Stack) -> None:
        """Keep what some clients have become."""
        place = _span(rows)
        for name, tensor in (*stack.weights.items(), *stack.buffers.items()):
            kept = self._all[name]
            if not place:
                kept[rows] = tensor
            elif kept[place].data_ptr() != tensor.data_ptr():
                kept[place] = tensor

    def named(self) -> dict[str, Tensor]:
        """All tensors under the names of the state dict, in which a shared tensor has several."""
        first = {id(t): name for name, t in (*self._model.named_parameters(), *self._model.named_buffers())}
        tensors = {name: t for name, t in self._model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        names = {name: first[id(t)] for name, t in tensors.items()}
        return {
            name: self._all[own] if own in self._all else self.start[own].expand(self._count, *self.start[own].shape)
            for name, own in names.items()
        }


def _span(rows: list[int]) -> slice | None:
    """The rows as a slice, where each follows the one before."""
    return slice(rows[0], rows[-1] + 1) if rows == [*range(rows[0], rows[-1] + 1)] else None
