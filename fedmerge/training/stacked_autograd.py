"""Stacked training of any model that ``torch.vmap`` can take: the general engine."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedmerge.errors import CannotStack
from fedmerge.tasks.classification import Classification
from fedmerge.tasks.label_shapes import class_axis_of
from fedmerge.training.cohort_batches import CohortBatches
from fedmerge.training.dropout_masks import DropoutCall, DropoutStreams, Recorder, Replay, fork
from fedmerge.training.local_training import LocalTraining
from fedmerge.training.padded_lookups import PaddedLookups
from fedmerge.training.stack import Members, Stack, call, descend
from fedmerge.training.stacked_loss import StackedLoss, settled_loss

__all__ = ["is_out_of_memory", "train_by_autograd"]


def train_by_autograd(
    model: nn.Module,
    stack: Stack,
    batches: CohortBatches,
    start: dict[str, Tensor],
    settings: LocalTraining,
    streams: DropoutStreams,
    rates: Tensor | None = None,
) -> Tensor:
    """Train all clients of a stack in place; the sum [K] of each one's losses over the examples that it saw.

    Parameters
    ----------
    model
        The architecture, in training mode; nothing in it changes.
    stack
        What the clients start from, in the order of `batches`.
    batches, settings, streams
        Their batches, how to train, and their dropout.
    start
        The weights sent out.
    rates
        Learning rates [K, steps], where they are not those of the settings.
    """
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    device = next(model.parameters()).device
    total = torch.zeros(len(batches.sizes), dtype=torch.float64, device=device)
    looks: dict[int, list[DropoutCall | None]] = {}
    loss_of: StackedLoss | None = None
    alone: bool | None = None
    for step in range(batches.steps):
        sizes = batches.sizes[:, step]
        if alone is None and len(set(sizes[sizes > 0].tolist())) > 1:
            alone = _rows_stand_alone(model, batches)
        for members in _groups(sizes, together=bool(alone)):
            x, y, weights = batches.at(step, members)
            rows = x.shape[1]
            if rows not in looks:
                looks[rows], outputs = _dropout_calls(model, x[0])
                loss_of = loss_of or _settled(model, x[0], outputs, y[0], batches)
            masks = streams.draw(np.arange(len(sizes))[members].tolist(), looks[rows])
            part = stack.part(members)
            assert loss_of is not None  # the first batch has settled it
            losses, gradients = _gradients(model, loss_of, part, fixed, x, y, weights, masks)
            descend(part, gradients, start, settings, step, None if rates is None else rates[members, step])
            stack.put(members, part)
            total[members] += losses.double() * torch.from_numpy(sizes[members]).to(device)
    return total


def _groups(sizes: NDArray[np.int64], *, together: bool) -> list[Members]:
    """The clients still at work, divided into those that can share a call.

    Rows that a client lacks would count in its batch statistics, so clients with unequal batches go together only
    where rows do not see each other.
    """
    working = int((sizes > 0).sum())
    if together:
        return [slice(0, working)]
    groups: list[Members] = []
    for size in sorted({*sizes[:working].tolist()}, reverse=True):
        members = np.flatnonzero(sizes == size)
        whole = members[-1] - members[0] + 1 == len(members)
        groups.append(slice(int(members[0]), int(members[-1]) + 1) if whole else members)
    return groups


def _gradients(
    model: nn.Module,
    loss_of: StackedLoss,
    part: Stack,
    fixed: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    masks: Sequence[Tensor | None],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [k] and gradients [k, *shape] of each client; moves the batch statistics in `part`."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in part.weights.items()}
    drawn = [mask for mask in masks if mask is not None]

    def loss(
        mine: dict[str, Tensor],
        buffers: dict[str, Tensor],
        inputs: Tensor,
        labels: Tensor,
        shares: Tensor | None,
        own: list[Tensor],
    ) -> Tensor:
        remaining = iter(own)
        with Replay([None if mask is None else next(remaining) for mask in masks]), PaddedLookups():
            outputs = call(model, {**fixed, **mine, **buffers}, inputs)
        return loss_of.of(outputs, labels, shares)

    dims = (0, 0, 0, 0, None if weights is None else 0, 0)
    try:
        # The fused attention kernels have no rule for vmap.
        with (
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            # A pass that is run again for its gradient would run with the weights of the model, not of the clients.
            torch.autograd.graph.disable_saved_tensors_hooks("activations are computed again for the gradient"),
            warnings.catch_warnings(),
        ):
            # Where an operator runs client by client after all, the measurement of `choose_engine` tells.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            losses = vmap(loss, dims, randomness="error")(leaves, part.buffers, x, y, weights, drawn)
            slopes = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise CannotStack(str(error).strip().partition("\n")[0]) from error
    gradients = {name: g for name, g in zip(leaves, slopes, strict=True) if g is not None}
    return losses.detach(), gradients


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or the system lacked memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _run(model: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """Output in training mode on copies of the buffers, and whether it changed one of them."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        out = call(model, buffers, x)
    return out, any(not torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def _settled(model: nn.Module, x: Tensor, outputs: Tensor, y: Tensor, batches: CohortBatches) -> StackedLoss:
    """The loss for this model, once all labels are known to fit it."""
    if batches.task is not None:
        return settled_loss(batches.task, model, x, outputs, y, batches.participants)
    axis = class_axis_of(model, x, outputs, y)
    batches.check_classes(outputs.shape[axis])
    return StackedLoss(Classification(class_axis=axis))


def _dropout_calls(model: nn.Module, x: Tensor) -> tuple[list[DropoutCall | None], Tensor]:
    """The calls of dropout in a forward pass on one client's batch of this size, and its outputs."""
    recorder = Recorder(x.device)
    with fork(x.device), recorder:
        outputs, _ = _run(model, x)
    return recorder.calls, outputs


def _rows_stand_alone(model: nn.Module, batches: CohortBatches) -> bool:
    """Whether a row's output is the same whatever rows come with it, and neither dropout nor buffers see the rows."""
    x = batches.at(0, slice(0, 1))[0][0]
    other = x.clone()
    other[-1] = 1 - 2 * x[-1] if x.is_floating_point() else x[0]
    if len(x) < 2 or torch.equal(x, other) or any(_dropout_calls(model, x)[0]):
        return False
    (outputs, moved), (two, _) = _run(model, x), _run(model, other)
    return not moved and torch.allclose(outputs[:-1], two[:-1], rtol=1e-5, atol=1e-6)
