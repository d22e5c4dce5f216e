"""Local training of many clients in one call, their weights stacked: the batches and the result of the serial path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.training.cohort_batches import CohortBatches, Participant, count_steps
from fedmerge.training.dropout_masks import DropoutStreams
from fedmerge.training.linear_layers import linear_layers
from fedmerge.training.linear_stack import Layer, train_linear
from fedmerge.training.local import LocalTraining
from fedmerge.training.report import TrainingReport
from fedmerge.training.stack import Stack, slots
from fedmerge.training.stack_size import clients_at_once
from fedmerge.training.stacked_autograd import is_out_of_memory, train_by_autograd

__all__ = ["Participant", "TrainedCohort", "train_cohort"]

# A linear layer's forward pass is faster on transposed weights, but they have to be copied back; the copy costs about
# as much as is saved on this many examples.
_EXAMPLES_WORTH_TRANSPOSING = 32


@dataclass(frozen=True, eq=False)
class TrainedCohort:
    """What the clients of a cohort send back.

    Parameters
    ----------
    states
        Parameters and buffers under their ``state_dict`` names, [K, *shape], clients in the order given. A frozen
        parameter is a view of the model's own.
    reports
        One for each client.
    """

    states: dict[str, Tensor]
    reports: list[TrainingReport]

    def state(self, index: int) -> dict[str, Tensor]:
        """One client's state; views."""
        return {name: tensor[index] for name, tensor in self.states.items()}


def train_cohort(
    model: nn.Module,
    participants: Sequence[Participant],
    settings: LocalTraining,
    *,
    seed: int,
    round: int,
    at_once: int | None = None,
) -> TrainedCohort:
    """Train all `participants`, each from `model`, with their weights stacked.

    Each draws the batches and dropout that `fedmerge.training.train` would draw for it, and ends where that would take
    it, up to float summation order. Plain stacks of linear layers have their gradient written by hand, other models go
    through ``torch.vmap``.

    Parameters
    ----------
    model
        The model sent out this round; it is not modified.
    participants
        The clients, with any numbers of examples.
    settings
        How to train.
    seed, round
        Name the random streams, with each client's number.
    at_once
        Clients in one stack; by default as many as are fast, and fit into half of the free memory. Halved where memory
        runs out.

    Raises
    ------
    CannotStack
        The model has a part without a rule for ``torch.vmap``, or its inputs differ in shape: train one by one.
    InvalidOption
        There are no participants, or one has no examples.

    Examples
    --------
    >>> x, y = torch.randn(10, 2), torch.zeros(10, dtype=torch.long)
    >>> clients = [Participant(0, x, y), Participant(1, x[:5], y[:5])]
    >>> done = train_cohort(nn.Linear(2, 3), clients, LocalTraining(epochs=1, batch_size=4), seed=0, round=1)
    >>> done.states["weight"].shape, [report.steps for report in done.reports]
    (torch.Size([2, 3, 2]), [3, 2])
    """
    if not participants:
        raise InvalidOption("there are no participants to train")
    device = next(model.parameters()).device
    first = participants[0]
    layers = linear_layers(model, first.x, first.y) if len(first.x) else None
    out = _Results(model, len(participants))
    # The longest first, so that those who still work are always in front.
    steps = [count_steps(len(one.x), settings) for one in participants]
    order = sorted(range(len(participants)), key=lambda i: (-steps[i], -len(participants[i].x)))
    with _training(model):
        size = at_once or clients_at_once(model, participants[order[0]], settings, by_hand=layers is not None)
    losses: list[float] = [0.0] * len(participants)
    done = 0
    while done < len(order):
        rows = order[done : done + size]
        try:
            chunk = [participants[row] for row in rows]
            with _training(model):
                total = _train_chunk(model, layers, out, rows, chunk, settings, seed, round)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size = max(1, min(size, len(rows)) // 2)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        for row, loss in zip(rows, total.tolist(), strict=True):
            losses[row] = loss
        done += len(rows)
    seen = [_examples_seen(len(one.x), count, settings) for one, count in zip(participants, steps, strict=True)]
    reports = [settings.report(n, loss / k) for n, loss, k in zip(steps, losses, seen, strict=True)]
    return TrainedCohort(out.states(), reports)


def _train_chunk(
    model: nn.Module,
    layers: tuple[Layer, ...] | None,
    out: _Results,
    rows: list[int],
    chunk: list[Participant],
    settings: LocalTraining,
    seed: int,
    round: int,
) -> Tensor:
    """Train some clients into their rows of the results; the sum of each one's losses."""
    batches = CohortBatches(chunk, settings, seed, round, out.device)
    transpose = layers is not None and batches.rows[0].size >= _EXAMPLES_WORTH_TRANSPOSING
    stack = out.stack(rows, settings, {layer.weight for layer in layers or ()} if transpose else set())
    with torch.no_grad():
        if layers is not None:
            total = train_linear(layers, stack, batches, out.start, settings)
        else:
            streams = DropoutStreams([one.client for one in chunk], seed, round, out.device)
            total = train_by_autograd(model, stack, batches, out.start, settings, streams)
        out.put(rows, stack)
    return total


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The model in training mode for a while. No copy of it: a forward may hold on to the very module it belongs to."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Results:
    """The tensors of all clients, written chunk by chunk."""

    def __init__(self, model: nn.Module, count: int) -> None:
        self._model, self._count = model, count
        self.start = {name: p.detach() for name, p in model.named_parameters()}
        self._weights = {name for name, p in model.named_parameters() if p.requires_grad}
        self._buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
        self.device = next(iter(self.start.values())).device
        moving = {**{name: self.start[name] for name in self._weights}, **self._buffers}
        self._all = {name: t.new_empty(count, *t.shape) for name, t in moving.items()}

    def stack(self, rows: list[int], settings: LocalTraining, transposed: set[str]) -> Stack:
        """The start of some clients, in place where their rows follow each other."""
        place = _span(rows)

        def copies(name: str, tensor: Tensor) -> Tensor:
            if name in transposed:
                return tensor.new_empty(len(rows), *tensor.shape[::-1]).copy_(tensor.T).mT
            room = self._all[name][place] if place else tensor.new_empty(len(rows), *tensor.shape)
            return room.copy_(tensor)

        weights = {name: copies(name, tensor) for name, tensor in self.start.items() if name in self._weights}
        buffers = {name: copies(name, tensor) for name, tensor in self._buffers.items()}
        return Stack(weights, buffers, slots(settings, weights))

    def put(self, rows: list[int], stack: Stack) -> None:
        """Keep what some clients have become."""
        place = _span(rows)
        for name, tensor in (*stack.weights.items(), *stack.buffers.items()):
            kept = self._all[name]
            if not place:
                kept[rows] = tensor
            elif kept[place].data_ptr() != tensor.data_ptr():
                kept[place] = tensor

    def states(self) -> dict[str, Tensor]:
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


def _examples_seen(examples: int, steps: int, settings: LocalTraining) -> int:
    each = -(-examples // settings.batch_size)
    whole, rest = divmod(steps, each)
    return whole * examples + rest * settings.batch_size
