"""A loss of one's own in a task that is made from another: its likelihood is not the other's.

A subclass that overrides ``mean_loss`` or ``losses`` and inherits the rest would train with one loss and be measured by
the curvature of another. So what it inherits is replaced: the one loss follows from the other, the residual is their
gradient by autograd, and the Fisher is the empirical one. What takes a distribution of labels is refused. Whoever knows
better overrides those methods as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fedmerge.errors import TaskError

__all__ = ["derive_likelihood", "gradient_of_losses"]


def derive_likelihood(task: type) -> None:
    """Replace, in place, what a class of tasks inherits from one with another loss.

    Examples
    --------
    >>> from fedmerge.tasks import Regression
    >>> class Absolute(Regression):
    ...     def mean_loss(self, outputs, targets):
    ...         return (outputs - targets).abs().mean()
    >>> Absolute().residual(torch.tensor([[3.0], [-1.0]]), torch.zeros(2, 1)).tolist()
    [[1.0], [-1.0]]
    """
    depth = {name: _depth(task, name) for name in _DERIVED}
    inherited = [name for name, above in depth.items() if above > min(depth["mean_loss"], depth["losses"])]
    if any(name in _LIKELIHOOD and not _is_abstract(task, name) for name in inherited):
        for name in inherited:
            if not _is_abstract(task, name):
                setattr(task, name, _DERIVED[name])


def _depth(task: type, name: str) -> int:
    """How far up a name is defined."""
    return next((i for i, cls in enumerate(task.__mro__) if name in vars(cls)), len(task.__mro__))


def _is_abstract(task: type, name: str) -> bool:
    return bool(getattr(getattr(task, name), "__isabstractmethod__", False))


def gradient_of_losses(task: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """By autograd, in the outputs' shape."""
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        total = task.losses(leaf, targets).sum()
    return torch.autograd.grad(total, leaf)[0]


def _losses(task: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """One example after the other, for a mean over the batch would mix them."""
    each = [(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))]
    return torch.stack([task.mean_loss(*example).reshape(()) * task.weight(*example) for example in each])


def _mean_loss(task: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """Of the losses; 0 where no label counts."""
    total: Tensor = task.losses(outputs, targets).sum()
    weight = task.weight(outputs, targets).to(total.dtype)
    return total / torch.where(weight > 0, weight, torch.ones_like(weight))


def _vectors(
    task: Any, outputs: Tensor, targets: Tensor, estimator: str, generator: torch.Generator
) -> Iterator[Tensor]:
    """Of the labels given, unless others are asked for."""
    if estimator not in ("auto", "empirical"):
        raise _unknown(task)
    yield task.residual(outputs.detach(), targets)


def _refused(task: Any, *_: Any) -> Any:
    """Not known."""
    raise _unknown(task)


def _unknown(task: Any) -> TaskError:
    kind = type(task).__name__
    return TaskError(
        f"{kind} has a loss of its own, whose label distribution is not known, hence no curvature: set estimator = "
        f'"empirical" where a Fisher is measured, or have {kind} override residual, curvature, exact, sampled, '
        "output_fisher and vectors as well"
    )


_LIKELIHOOD = ("mean_loss", "losses", "residual", "curvature", "exact", "sampled", "output_fisher")
_DERIVED: dict[str, Callable[..., Any] | property | float] = {
    "losses": _losses,
    "mean_loss": _mean_loss,
    "residual": gradient_of_losses,
    "vectors": _vectors,
    "curvature": _refused,
    "exact": _refused,
    "sampled": _refused,
    "output_fisher": _refused,
    "residual_bound": property(lambda task: None),
    "lowest_loss": float("-inf"),
}
