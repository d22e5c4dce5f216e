"""How many clients to train in one stack: as many as caches like and memory holds."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor, nn

from fedmerge.training.cohort_batches import Participant
from fedmerge.training.dropout_masks import fork
from fedmerge.training.local_training import LocalTraining
from fedmerge.training.stack import call

__all__ = ["bytes_per_client", "clients_at_once", "free_memory"]

# On a CPU, the weights of a stack should stay in the cache from step to step; fewer clients pay more for Python.
_CACHED_BYTES = 8 << 20


def clients_at_once(model: nn.Module, longest: Participant, settings: LocalTraining, *, by_hand: bool) -> int:
    """Clients in one stack.

    Parameters
    ----------
    model
        The model.
    longest
        The client with the largest batches.
    settings
        How to train.
    by_hand
        Whether the gradient is written by hand, which keeps no activations to speak of.

    Examples
    --------
    >>> one = Participant(0, torch.zeros(8, 100), torch.zeros(8, dtype=torch.long))
    >>> clients_at_once(nn.Linear(100, 1000), one, LocalTraining(), by_hand=True)
    20
    """
    device = next(model.parameters()).device
    weights = sum(_bytes(p) for p in model.parameters())
    if by_hand and device.type == "cpu":
        return max(1, _CACHED_BYTES // weights)
    fitting = int(free_memory(device) / 2 / bytes_per_client(model, longest.x, settings))
    cached = max(1, _CACHED_BYTES // weights) if device.type == "cpu" else fitting
    return max(1, min(fitting, cached))


def bytes_per_client(model: nn.Module, x: Tensor, settings: LocalTraining) -> int:
    """Memory of one more client: weights, gradient, optimiser, and what the backward pass keeps.

    Examples
    --------
    >>> bytes_per_client(nn.Linear(10, 5, bias=False), torch.zeros(1, 10), LocalTraining()) >= 3 * 4 * 50
    True
    """
    slots = 2 if settings.optimizer != "sgd" else 1 if settings.momentum else 0
    weights = sum(_bytes(p) for p in model.parameters())
    kept: dict[int, int] = {p.data_ptr(): 0 for p in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.data_ptr(), _bytes(tensor))
        return tensor

    device = next(model.parameters()).device
    batch = x[: settings.batch_size].to(device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with fork(device), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call(model, buffers, batch)
    # The backward pass makes a gradient of each activation while it uses the activation itself.
    return weights * (2 + slots) + 2 * sum(kept.values()) + _bytes(batch)


def free_memory(device: torch.device) -> int:
    """Bytes that may be taken."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
