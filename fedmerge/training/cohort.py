"""Local training of many clients in one call, their weights stacked: the batches and the result of the serial path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedmerge.errors import CannotStack, InvalidOption
from fedmerge.models.tangent import Tangent
from fedmerge.tasks import Task
from fedmerge.training.cohort_batches import CohortBatches, Participant, check_participants, count_steps
from fedmerge.training.cohort_states import CohortStates
from fedmerge.training.dropout_masks import DropoutStreams
from fedmerge.training.forward_watch import why_not_stacked
from fedmerge.training.linear_layers import linear_layers
from fedmerge.training.linear_stack import train_linear
from fedmerge.training.local_training import LocalTraining
from fedmerge.training.model_on_data import device_of, training_mode
from fedmerge.training.report import TrainingReport
from fedmerge.training.seeding_many import Streams
from fedmerge.training.stack import stacked_rates
from fedmerge.training.stack_size import clients_at_once
from fedmerge.training.stacked_autograd import is_out_of_memory, train_by_autograd
from fedmerge.training.stacked_loss import as_stacked, is_plain

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
    pull: float = 0.0,
    task: Task | None = None,
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
        The clients, with any numbers of examples, and tensors of their own to start from if they have any.
    settings
        How to train.
    seed, round
        Name the random streams, with each client's number.
    at_once
        Clients in one stack; by default as many as are fast, and fit into half of the free memory. Halved where memory
        runs out.
    pull
        How strongly the method holds all clients at `model`, besides ``settings.proximal_mu``; what it adds to the
        gradients of each stands with the participants.
    task
        Whose loss to minimise; cross-entropy where not given.

    Raises
    ------
    CannotStack
        The model has a part that is not known to train right under ``torch.vmap``, its inputs differ in shape, or the
        settings ask for what one client at a time can do, or the task's loss is no mean over labels that count alike:
        train one by one.
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
    if at_once is not None and at_once < 1:
        raise InvalidOption(f"at_once must be at least 1, or left out, got {at_once}")
    device_of(model)
    check_participants(participants)
    if settings.why_serial is not None:
        raise CannotStack(settings.why_serial)
    model, settings = settings.trained_as(model), settings.in_round(round)
    pulled = replace(settings, proximal_mu=settings.proximal_mu + pull) if pull else settings
    plain = is_plain(task, participants)
    task, participants = as_stacked(None if plain else task, participants)
    first = participants[0]
    layers = linear_layers(model, first.x, first.y) if plain else None
    # The longest first, so that those who still work are always in front.
    steps = [count_steps(len(participant.x), settings) for participant in participants]
    order = sorted(range(len(participants)), key=lambda row: (-steps[row], -len(participants[row].x)))
    states = CohortStates(model, len(participants), [participant.start for participant in participants])
    held = bool(pulled.proximal_mu)
    streams = Streams(seed, "batches", [participant.client for participant in participants], round)
    losses = [0.0] * len(participants)

    def train(rows: list[int]) -> Tensor:
        """Train some clients into their rows of the states; the sum of each one's losses."""
        chunk = [participants[row] for row in rows]
        offsets = (
            [participant.offset for participant in chunk] if any(participant.offset for participant in chunk) else []
        )
        rates = stacked_rates(settings, [steps[row] for row in rows], states.device)
        batches = CohortBatches(chunk, settings, streams.generators(rows), states.device, task)
        if layers is None:
            dropout = DropoutStreams([participant.client for participant in chunk], seed, round, states.device)
            stack = states.stack(rows, settings, offsets=offsets, pulled=held)
            total = train_by_autograd(model, stack, batches, states.start, pulled, dropout, rates)
        else:
            worth = batches.rows[0].size >= _EXAMPLES_WORTH_TRANSPOSING
            flipped = {layer.weight for layer in layers} if worth else ()
            stack = states.stack(rows, settings, flipped, offsets, pulled=held)
            total = train_linear(layers, stack, batches, states.start, pulled, rates)
        states.put(rows, stack)
        return total

    with torch.no_grad(), _training(model, settings):
        if layers is None:
            _check_known(model, participants[order[0]], settings, states.device)
        size = at_once or clients_at_once(model, participants[order[0]], settings, by_hand=layers is not None)
        while order:
            rows = order[:size]
            total = _or_none_for_want_of_memory(train, rows)
            if total is None:
                size = max(1, len(rows) // 2)
                continue
            for row, loss in zip(rows, total.tolist(), strict=True):
                losses[row] = loss
            order = order[size:]
    seen = [
        _examples_seen(len(participant.x), count, settings)
        for participant, count in zip(participants, steps, strict=True)
    ]
    rates = {n: settings.rates(n) for n in set(steps)}
    reports = [settings.report(n, loss / k, rates[n]) for n, loss, k in zip(steps, losses, seen, strict=True)]
    return TrainedCohort(states.named(), reports)


def _check_known(model: nn.Module, longest: Participant, settings: LocalTraining, device: torch.device) -> None:
    """Refuse a model that is not known to train right with stacked weights."""
    # Of a linearised model the derivatives are of known operators, and those of derivatives are their own.
    shown = model.plain if isinstance(model, Tangent) else model
    reason = why_not_stacked(shown, longest.x[: settings.batch_size].to(device))
    if reason is not None:
        raise CannotStack(reason)


def _or_none_for_want_of_memory(train: Callable[[list[int]], Tensor], rows: list[int]) -> Tensor | None:
    """What `train` returns; None where memory did not suffice and fewer clients may do."""
    try:
        return train(rows)
    except (RuntimeError, MemoryError) as error:
        if len(rows) == 1 or not is_out_of_memory(error):
            raise
    # Not inside the handler: the error holds on to what was computed so far.
    torch.cuda.empty_cache()
    return None


@contextmanager
def _training(model: nn.Module, settings: LocalTraining) -> Iterator[None]:
    """The model in training mode for a while. No copy of it: a forward may hold on to the very module it belongs to."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        training_mode(model, settings.frozen_mode)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _examples_seen(examples: int, steps: int, settings: LocalTraining) -> int:
    each = -(-examples // settings.batch_size)
    whole, rest = divmod(steps, each)
    return whole * examples + rest * settings.batch_size
