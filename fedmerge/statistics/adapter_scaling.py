"""By what a client multiplies its low-rank updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fedmerge.adapters.scalings import scalings
from fedmerge.errors import InvalidOption
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics.statistic_type import Batches, Shapes, Statistic
from fedmerge.training.report import TrainingReport

__all__ = ["AdapterScaling"]

_LARGEST = 1e6  # alpha is of the size of r; more is a mistake, or an attack on whoever multiplies by it


@register("adapter_scaling")
@dataclass(frozen=True)
class AdapterScaling(Statistic):
    """The scaling of every low-rank pair, ``alpha / r``: float64 scalars by the names of the pairs' A.

    A layer tells it as peft's do, in its mapping ``scaling``. Shapes tell a pair's rank, but not its alpha, so it
    travels as a number. It is not asked of those who do not know of it: a client that sends none is taken to have the
    scaling that the server's model has.

    Parameters
    ----------
    pairs
        Patterns of one's own names, see :func:`~fedmerge.adapters.find_pairs`.

    Examples
    --------
    >>> from fedmerge.adapters import lora
    >>> AdapterScaling().measure(lora(nn.Linear(3, 2), rank=2, alpha=8), [], None)
    {'lora_A.default.weight': tensor(4., dtype=torch.float64)}
    """

    pairs: tuple[str, ...] = ()

    name: ClassVar[str] = "adapter_scaling"
    agreed: ClassVar[bool] = False
    optional: ClassVar[bool] = True
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64,)

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Read it off the layers; no pass over the data."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in scalings(model, self.pairs).items()}

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """Numbers, for tensors of the model.

        Raises
        ------
        InvalidOption
            Some are not.
        """
        for name, shape in shapes.items():
            if name not in state or shape != ():
                raise InvalidOption(f"adapter_scaling: {name!r} must be one number, for a tensor of the model")

    def voted(self, shapes: Shapes) -> Shapes:
        """Nothing: what is missing is the server's."""
        return {}

    def check(self, value: State, state: State) -> None:
        """Above 0, and of a size that an alpha can have.

        Raises
        ------
        InvalidOption
            One is not.
        """
        self.check_shapes({name: tuple(tensor.shape) for name, tensor in value.items()}, state)
        for name, tensor in value.items():
            number = float(tensor)
            if not (math.isfinite(number) and 0 < number <= _LARGEST):
                raise InvalidOption(f"adapter_scaling: that of {name!r} must lie in (0, {_LARGEST:g}], got {number}")
