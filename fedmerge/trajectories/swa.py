"""The mean of all models from some round on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedmerge.lookup.option_checks import check_count, check_word
from fedmerge.registry import register
from fedmerge.state import State, prefixed, with_prefix
from fedmerge.trajectories.trajectory import ContinueFrom, Trajectory, TrajectoryContext, between

__all__ = ["Swa"]


@register("swa", paper="arXiv:1803.05407")
@dataclass(frozen=True)
class Swa(Trajectory):
    """Judge the mean of the global models from some round on (stochastic weight averaging).

    Izmailov et al. 2018, algorithm 1: ``avg <- avg + (theta - avg) / (n + 1)`` every `every` rounds from `start` on;
    until then the newest model is judged. Here the models are a run's global ones. Running statistics of norms are
    averaged alike; ``batch_norm="recalibrate"`` has clients measure them anew at the average, as the paper does.

    Parameters
    ----------
    start
        First round that counts, at least 1.
    every
        Rounds from one model that counts to the next, at least 1.
    continue_from
        ``"raw"``: clients go on from the newest model, as in the paper; ``"average"``: from the mean.

    Examples
    --------
    >>> swa, memory = Swa(), {}
    >>> for round, value in ((1, 1.0), (2, 3.0), (3, 5.0)):
    ...     mean, memory = swa.average({"w": torch.tensor([value])}, TrajectoryContext(round), memory)
    >>> mean["w"]
    tensor([3.])
    """

    start: int = 1
    every: int = 1
    continue_from: ContinueFrom = "raw"

    def __post_init__(self) -> None:
        check_count(self, "start", 1)
        check_count(self, "every", 1)
        check_word(self, "continue_from", ("raw", "average"))

    def average(self, model: State, context: TrajectoryContext, memory: State) -> tuple[State, State]:
        """The mean so far; the memory is the mean and how many models it is of."""
        if context.round < self.start:
            return model, {}
        mean: State = prefixed("mean", memory)
        number = memory.get("number", torch.tensor(0))
        if int(number) == 0:
            mean, number = model, number + 1
        elif (context.round - self.start) % self.every == 0:
            mean, number = between(mean, model, 1.0 / (int(number) + 1)), number + 1
        return mean, {**with_prefix("mean", mean), "number": number}
