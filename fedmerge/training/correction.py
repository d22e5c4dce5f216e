"""What a method adds to every gradient of a client's local training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedmerge.state import State

__all__ = ["NO_CORRECTION", "Correction", "correct"]


@dataclass(frozen=True, eq=False)
class Correction:
    """``gradient + pull (theta - theta_0) + offset``: the same in every step of a round, so that it trains stacked.

    Parameters
    ----------
    pull
        How strongly a client is held at the model theta_0 that it was sent.
    offset
        Tensors by the names of parameters, of their shapes; parameters without one have none.
    velocity
        SGD's momentum at the first step, by the names of parameters, zero for those without one; training reports it
        as it is after the last step. None: it begins at zero and is forgotten.
    """

    pull: float = 0.0
    offset: State = field(default_factory=dict)
    velocity: State | None = None

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return self.pull != 0 or bool(self.offset) or self.velocity is not None


NO_CORRECTION = Correction()


def correct(gradients: Mapping[str, Tensor], weights: State, start: State, pull: float, offset: State) -> None:
    """Add a correction to gradients, in place; those of many clients have a row for each, and so have their offsets.

    Parameters
    ----------
    gradients, weights
        [*shape], or [K, *shape] of K clients.
    start
        What they were sent, [*shape].
    pull, offset
        See :class:`Correction`.

    Examples
    --------
    >>> import torch
    >>> gradient = torch.ones(2)
    >>> correct({"w": gradient}, {"w": torch.ones(2)}, {"w": torch.zeros(2)}, 0.5, {"w": torch.full((2,), -1.0)})
    >>> gradient
    tensor([0.5000, 0.5000])
    """
    for name, gradient in gradients.items():
        if pull:
            gradient.add_(weights[name] - start[name], alpha=pull)
        if name in offset:
            gradient.add_(offset[name])
