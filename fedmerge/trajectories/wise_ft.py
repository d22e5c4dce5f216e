"""Models between the one that a run began with and the newest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_count, check_range, check_word
from fedmerge.registry import register
from fedmerge.state import State, accumulator_dtype
from fedmerge.trajectories.trajectory import ContinueFrom, Trajectory, TrajectoryContext, between, check_widths

__all__ = ["Paint", "WiseFt"]


@register("wise_ft", paper="arXiv:2109.01903")
@dataclass(frozen=True)
class WiseFt(Trajectory):
    """Judge a model between the one that the run began with and the newest (WiSE-FT).

    Wortsman et al. 2022, equation 1: ``(1 - alpha) theta_0 + alpha theta``. Where ``theta_0`` is pretrained, this keeps
    what it could do outside of the clients' data.

    Parameters
    ----------
    alpha
        Share of the newest model, in [0, 1].
    continue_from
        ``"raw"``: clients go on from the newest model; ``"average"``: from the one between.

    Examples
    --------
    >>> import torch
    >>> context = TrajectoryContext(1, base={"w": torch.tensor([0.0])})
    >>> WiseFt(alpha=0.25).average({"w": torch.tensor([4.0])}, context, {})[0]["w"]
    tensor([1.])
    """

    alpha: float = 0.5
    continue_from: ContinueFrom = "raw"

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0.0, 1.0)
        check_word(self, "continue_from", ("raw", "average"))

    def average(self, model: State, context: TrajectoryContext, memory: State) -> tuple[State, State]:
        """The model between; the memory is the first one."""
        first = _first(model, memory, context, "wise_ft")
        return between(first, model, self.alpha), first


@register("paint", paper="arXiv:2208.05592")
@dataclass(frozen=True)
class Paint(Trajectory):
    """As WiSE-FT, at the share that clients' held-out examples find best (PAINT).

    Ilharco et al. 2022, section 2: the share is scanned over ``0, 1 / (points - 1), ..., 1``, and the one with the
    least mean loss is taken, the newest model's among equals.

    Parameters
    ----------
    points
        How many shares are tried, at least 2.
    continue_from
        As of :class:`WiseFt`.
    """

    asks: ClassVar[bool] = True

    points: int = 11
    continue_from: ContinueFrom = "raw"

    def __post_init__(self) -> None:
        check_count(self, "points", 2)
        check_word(self, "continue_from", ("raw", "average"))

    def average(self, model: State, context: TrajectoryContext, memory: State) -> tuple[State, State]:
        """The best model between; the memory is the first one."""
        first = _first(model, memory, context, "paint")
        back = {name: first[name].to(accumulator_dtype(t.dtype)) - t for name, t in model.items()}
        shares = [1 - step / (self.points - 1) for step in range(self.points)]
        losses = context.required_losses("paint")(model, back, [1 - share for share in shares])
        return between(first, model, shares[losses.index(min(losses))]), first


def _first(model: State, memory: State, context: TrajectoryContext, method: str) -> State:
    if memory:
        return memory
    if context.base is None:
        raise InvalidOption(f"{method} goes back towards the model that all clients started from: pass base=.")
    check_widths(model, context.base)
    return context.base
