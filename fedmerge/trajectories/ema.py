"""An exponential mean of the models."""

from __future__ import annotations

from dataclasses import dataclass

from fedmerge.lookup.option_checks import check_range, check_word
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.trajectories.trajectory import ContinueFrom, Trajectory, TrajectoryContext, between

__all__ = ["Ema"]


@register("ema", paper="arXiv:2406.16768")
@dataclass(frozen=True)
class Ema(Trajectory):
    """Judge an exponential moving average of the global models.

    Ramé et al. 2024, equation 1: ``avg <- (1 - rate) avg + rate theta`` after every round. The first model is the
    average at first, so that the initialisation, which nobody trained, has no share in it.

    Parameters
    ----------
    rate
        Share of the newest model, in (0, 1]; at 1 it is the average.
    continue_from
        ``"raw"``: clients go on from the newest model; ``"average"``: from the average, which is a server step of
        length `rate`.

    Examples
    --------
    >>> import torch
    >>> first, memory = Ema(rate=0.25).average({"w": torch.tensor([1.0])}, TrajectoryContext(1), {})
    >>> Ema(rate=0.25).average({"w": torch.tensor([5.0])}, TrajectoryContext(2), memory)[0]["w"]
    tensor([2.])
    """

    rate: float = 0.1
    continue_from: ContinueFrom = "raw"

    def __post_init__(self) -> None:
        check_range(self, "rate", 0.0, 1.0, open_low=True)
        check_word(self, "continue_from", ("raw", "average"))

    def average(self, model: State, context: TrajectoryContext, memory: State) -> tuple[State, State]:
        """The average; it is also the memory."""
        mean = between(memory, model, self.rate) if memory else dict(model)
        return mean, mean
