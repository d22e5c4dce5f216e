"""What a trajectory is: it makes the model that is judged out of the models of many rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.state import State, accumulator_dtype

__all__ = ["ContinueFrom", "Losses", "Trajectory", "TrajectoryContext", "between", "check_widths"]

ContinueFrom = Literal["raw", "average"]
"""From which model clients train in the next round: the merged one, or the average that is judged."""

Losses = Callable[[State, State, Sequence[float]], list[float]]
"""Held-out losses of the clients at ``state + factor * direction``, for each factor."""


@dataclass(frozen=True)
class TrajectoryContext:
    """What a trajectory may use besides the models.

    Parameters
    ----------
    round
        From 1.
    base
        The model that was sent out in this round, None where nobody knows it.
    losses
        Asks clients to judge models on their held-out examples; None where they cannot be asked.
    """

    round: int = 1
    base: State | None = None
    losses: Losses | None = None

    def required_losses(self, method: str) -> Losses:
        """`losses`, or an error that says how clients can be asked.

        Raises
        ------
        InvalidOption
            They cannot.
        """
        if self.losses is None:
            raise InvalidOption(f"{method} has clients judge models: pass clients=, one loader per model")
        return self.losses


class Trajectory(ABC):
    """An average over the global models of a run.

    Subclasses are frozen dataclasses registered with :func:`fedmerge.registry.register`. A trajectory stands at the end
    of a method, ``fedavg+swa``, and sees parameters and running statistics of norms, after server steps and
    refinements. What it returns is the model that a round ends with: it is tested, saved and exported. Training goes
    on from the merged model itself, unless ``continue_from`` says otherwise.
    """

    kind: ClassVar[str] = "trajectory"
    asks: ClassVar[bool] = False
    """Whether clients judge models for it, in one more exchange a round."""

    continue_from: ContinueFrom

    @abstractmethod
    def average(self, model: State, context: TrajectoryContext, memory: State) -> tuple[State, State]:
        """The model to be judged, and the memory for the next round.

        Parameters
        ----------
        model
            This round's merged model; its tensors may not be changed.
        context
            Round, model sent, and how clients judge.
        memory
            What was returned as memory last round; empty in the first.
        """


def check_widths(model: State, before: State) -> None:
    """Make sure that a model can be averaged with those of earlier rounds.

    Parameters
    ----------
    model
        This round's.
    before
        Tensors of earlier ones, under the same names, which may stand behind a prefix and ``/``.

    Raises
    ------
    InvalidOption
        One has another shape.
    """
    for key, tensor in before.items():
        name = key if key in model else key.partition("/")[2]
        if name in model and model[name].shape != tensor.shape:
            raise InvalidOption(
                f"{name!r} has shape {list(model[name].shape)}, and {list(tensor.shape)} in an earlier round: "
                "models of other widths have no average; take a method that keeps widths, or leave out the average "
                "over rounds"
            )


def between(start: State, end: State, share: float | Tensor) -> dict[str, Tensor]:
    """``start + share (end - start)``, in float32 or better.

    Examples
    --------
    >>> import torch
    >>> between({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, 0.25)["w"]
    tensor([1.])
    """
    middle = {}
    for name, tensor in end.items():
        wide = accumulator_dtype(tensor.dtype)
        first = start[name].to(wide)
        middle[name] = first + share * (tensor.to(wide) - first)
    return middle
