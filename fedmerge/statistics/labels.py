"""Whose labels a Fisher information speaks of: gradients of log-likelihoods by the model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.errors import InvalidOption

__all__ = ["Estimator", "Loss", "is_likelihood", "output_gradients"]

Estimator = Literal["auto", "exact", "sampled", "empirical"]
Loss = Callable[[Tensor, Tensor], Tensor]

_MOST_OUTPUTS = 128  # above, one backward pass per output is out of all proportion


def output_gradients(
    outputs: Tensor, targets: Tensor, estimator: Estimator, loss: Loss | None, generator: torch.Generator
) -> Iterator[Tensor]:
    """Vectors v [B, ...] with ``F = mean_x sum_v (J^T v)(J^T v)^T``, J the Jacobian of the outputs.

    Parameters
    ----------
    outputs
        Logits [B, C] or [B, T, C]: positions of a sequence have labels of their own.
    targets
        Labels [B] or [B, T]; only ``"empirical"`` reads them.
    estimator
        ``"exact"``: the expectation over the model's own label distribution, one v per output.
        ``"sampled"``: one label drawn from it. ``"empirical"``: the label given. ``"auto"``: exact up to 128
        outputs of an example, as in classification, else sampled, as in sequences.
    loss
        Cross-entropy where not given. For squared error the distribution is a unit normal around the output.
        Any other loss has no known distribution and takes ``"empirical"``.

    Raises
    ------
    InvalidOption
        A loss whose label distribution is not known, and another estimator than ``"empirical"``.
    """
    if estimator == "auto":
        estimator = "exact" if outputs[0].numel() <= _MOST_OUTPUTS else "sampled"
    if _is_categorical(loss):
        yield from _categorical(outputs, targets, estimator, generator)
    elif _is_normal(loss):
        yield from _normal(outputs, targets, estimator, generator)
    elif loss is not None and estimator == "empirical":
        yield _of_any_loss(outputs, targets, loss)
    else:
        raise InvalidOption(
            f'a Fisher information of the loss {loss!r} has no known label distribution: set estimator = "empirical"'
        )


def is_likelihood(loss: Loss | None) -> bool:
    """Whether a loss is the negative log-likelihood of a distribution that labels can be drawn from."""
    return _is_categorical(loss) or _is_normal(loss)


def _is_categorical(loss: Loss | None) -> bool:
    return loss is None or loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)


def _is_normal(loss: Loss | None) -> bool:
    return loss is F.mse_loss or isinstance(loss, nn.MSELoss)


def _categorical(logits: Tensor, targets: Tensor, estimator: Estimator, generator: torch.Generator) -> Iterator[Tensor]:
    p = logits.detach().softmax(-1)
    classes = p.shape[-1]
    if estimator == "exact":
        for one in _units(p):
            position = one.any(-1, keepdim=True)
            chosen = (p * one).sum(-1, keepdim=True)  # p_c, and 0 at other positions
            yield torch.where(position, p - one.to(p.dtype), torch.zeros_like(p)) * chosen.sqrt()
        return
    if estimator == "sampled":
        drawn = torch.multinomial(p.flatten(0, -2).cpu().double(), 1, generator=generator)
        labels = drawn.view(p.shape[:-1]).to(p.device)
    else:
        labels = targets
    yield p - F.one_hot(labels, classes).to(p.dtype)


def _normal(outputs: Tensor, targets: Tensor, estimator: Estimator, generator: torch.Generator) -> Iterator[Tensor]:
    if estimator == "exact":
        for one in _units(outputs):
            yield one.to(outputs.dtype).expand_as(outputs)
    elif estimator == "sampled":
        noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        yield noise.to(outputs)
    else:
        yield outputs.detach() - targets.to(outputs.dtype).view_as(outputs)


def _units(outputs: Tensor) -> Iterator[Tensor]:
    """One-hot masks [1, ...], one per output of an example."""
    count = outputs[0].numel()
    for i in range(count):
        one = torch.zeros(count, dtype=torch.bool, device=outputs.device)
        one[i] = True
        yield one.view(1, *outputs.shape[1:])


def _of_any_loss(outputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """Gradients of each example's own loss: a mean over the batch would shrink them."""
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        total = torch.stack([loss(o[None], t[None]).sum() for o, t in zip(leaf, targets, strict=True)]).sum()
    return torch.autograd.grad(total, leaf)[0]
