"""What a statistic is: something a client measures about its model after training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.state import State
from fedmerge.statistics.measuring.measurable import Measurable
from fedmerge.statistics.sending.laws import Breach
from fedmerge.statistics.sending.soundness import sound
from fedmerge.tasks import Reading, Task
from fedmerge.training.report import TrainingReport

__all__ = ["Batches", "Shapes", "Statistic"]

_ALWAYS_UNPACKED = 1 << 16  # numbers, whatever the size of the model

Batches = Iterable[tuple[Tensor, Tensor]]
Shapes = Mapping[str, tuple[int, ...]]


class Statistic(ABC):
    """A measurement that an aggregator asks for in its ``needs``.

    Subclasses are frozen dataclasses, one a file of this folder; their fields say how to measure.
    A value is a :data:`~fedmerge.state.State`, so that it travels and is stored like any other tensors.
    """

    kind: ClassVar[str] = "statistic"
    name: ClassVar[str]
    among_metrics: ClassVar[bool] = False
    """Whether a client may simply report it, as numbers among the metrics of its reply."""
    agreed: ClassVar[bool] = True
    """Whether clients have to agree on what it consists of, so that all have to be heard before any is merged."""
    optional: ClassVar[bool] = False
    """Whether an update without it is merged all the same; it is then read off models at hand, without their data."""
    of_labels: ClassVar[bool] = False
    """Whether the value depends on targets, and so on the model's task."""
    looks_inside: ClassVar[bool] = True
    """Whether it looks at the layers within a model, and not just at its outputs, its loss and their gradients."""
    dtypes: ClassVar[tuple[torch.dtype, ...]] = ()
    """Of which dtypes values are, where not of the model's, at least float32."""

    @abstractmethod
    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure on the client: its trained `model`, its training examples, what its training did.

        `report` is None where a model is measured that the client did not just train.
        """

    def answer(self, model: nn.Module, batches: Batches, own: nn.Module | None, directions: Sequence[State]) -> State:
        """Measure a merged `model` on a client that is asked about it; for what also looks at other things.

        Parameters
        ----------
        model, batches
            The model, and the client's examples.
        own
            What the client trained, where it has kept it.
        directions
            Tensors that may be added to the model's.

        Raises
        ------
        InvalidOption
            It cannot be measured here.
        """
        return self.measure(model, batches, None)

    def check_answer(self, value: State, state: State, directions: int) -> None:
        """:meth:`check` a parsed value of :meth:`answer`, to a question with so many directions.

        Raises
        ------
        InvalidOption
            It cannot be one.
        """
        self.check(value, state)

    def told(self, task: Task | Reading | None) -> Statistic:
        """This statistic of a model that is known to have this task; where tasks do not matter, as it is."""
        return self

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

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """Make sure that a value may have tensors of these names and shapes, before any memory is taken to unpack them.

        Raises
        ------
        InvalidOption
            They do not belong to the model with these parameters, or would be larger than it.
        """
        numbers = sum(math.prod(shape) for shape in shapes.values())
        most = max(sum(tensor.numel() for tensor in state.values()), _ALWAYS_UNPACKED)
        if numbers > most:
            raise InvalidOption(f"statistic {self.name!r}: it claims {numbers} numbers, {most} are allowed")

    def doubt(self, shapes: Shapes, state: State, model: Measurable) -> str | None:
        """Why tensors of these names and shapes are not what measuring `model` gives; None where they may be that.

        Said of what :meth:`check_shapes` lets pass, for a server that has the model itself and not its state alone.
        """
        return None

    def voted(self, shapes: Shapes) -> Shapes:
        """Of names and shapes, what has to be the same for all clients of a round."""
        return shapes

    def of_inputs(self, name: str) -> bool:
        """Whether a tensor of this name holds second moments of what goes into a layer, which no training shrinks."""
        return False

    def outlying(self, claims: Mapping[int, tuple[State, float]]) -> Mapping[int, str]:
        """Clients whose value no honest one of this round can have, beside the others' and their numbers of examples,
        each with the reason; for values of a few numbers, of which one could take all the say."""
        return {}

    def identities(self, value: State) -> Mapping[str, Breach]:
        """Identities that may hold between the numbers of a value, by name, and how far it is from each.

        Not all hold for every task and model: those that nearly all clients keep have to be kept by all, see
        :mod:`fedmerge.statistics.sending.laws`.
        """
        return {}

    def label_weight(self, value: State) -> float:
        """How much an example's label counts in a value, on average, where that stands in it: at most 1 unless classes
        are weighted."""
        return 0.0

    def check(self, value: State, state: State) -> None:
        """Make sure that a parsed value holds real numbers, finite and bounded, that belong to the model.

        Raises
        ------
        InvalidOption
            It does not.
        """
        self.check_shapes({name: tuple(tensor.shape) for name, tensor in value.items()}, state)
        for name, tensor in value.items():
            sound(self.name, name, tensor)

    def received(self, value: State, state: State) -> State:
        """A parsed value as methods may use it: checked, in float32 or better, what rounding broke mended.

        Raises
        ------
        InvalidOption
            It is not to be mended, see :meth:`check`.
        """
        self.check(value, state)
        return value

    def reordered(self, value: State, state: State, move: Callable[[State], State]) -> State:
        """A value of the model with parameters `state` as it is once `move` has re-ordered the model's neurons."""
        return value
