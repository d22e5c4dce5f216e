"""What a statistic is: something a client measures about its model after training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.state import State
from fedmerge.training.report import TrainingReport

__all__ = ["Batches", "Statistic"]

Batches = Iterable[tuple[Tensor, Tensor]]


class Statistic(ABC):
    """A measurement that an aggregator asks for in its ``needs``.

    Subclasses are frozen dataclasses, one a file of this folder; their fields say how to measure.
    A value is a :data:`~fedmerge.state.State`, so that it travels and is stored like any other tensors.
    """

    name: ClassVar[str]

    @abstractmethod
    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure on the client: its trained `model`, its training examples, what its training did.

        `report` is None where a model is measured that the client did not just train.
        """

    def parse(self, value: Mapping[str, Any]) -> State:
        """Bring a value given by hand, or read from the wire, into the form that :meth:`measure` returns.

        Raises
        ------
        InvalidOption
            The value cannot be one of this statistic.
        """
        try:
            return {name: torch.as_tensor(item) for name, item in value.items()}
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise InvalidOption(f"statistic {self.name!r}: want names and tensors, got {value!r} ({error})") from error
