"""The mean of the models between the beginning of convergence and that of overfitting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.lookup.option_checks import check_count, check_range, check_word
from fedmerge.registry import register
from fedmerge.state import State, WeightedSum, prefixed, with_prefix
from fedmerge.trajectories.trajectory import ContinueFrom, Trajectory, TrajectoryContext

__all__ = ["Swad", "window"]


@register("swad", paper="arXiv:2102.08604")
@dataclass(frozen=True)
class Swad(Trajectory):
    """Judge the mean of the global models while held-out loss is lowest (SWAD).

    Cha et al. 2021, algorithm 1, with a round for the paper's segment, and the clients' held-out loss for validation
    loss. The window opens at the oldest of the last `converge` models, once that has the least loss of them. Its
    threshold is their mean loss times ``1 + ratio``. It closes before the last `tolerance` models, once all of them lie
    above the threshold. Before it opens the newest model is judged.

    Parameters
    ----------
    converge
        The paper's N_s, at least 1.
    tolerance
        The paper's N_e, at least `converge`.
    ratio
        The paper's r, at least 0.
    continue_from
        ``"raw"``: clients go on from the newest model, as in the paper; ``"average"``: from the mean.

    Examples
    --------
    >>> window([3.0, 1.0, 1.1, 1.2, 9.0, 9.0, 9.0], converge=3, tolerance=3, ratio=0.3)
    (1, 4)
    """

    asks: ClassVar[bool] = True

    converge: int = 3
    tolerance: int = 6
    ratio: float = 0.3
    continue_from: ContinueFrom = "raw"

    def __post_init__(self) -> None:
        check_count(self, "converge", 1)
        check_count(self, "tolerance", self.converge)
        check_range(self, "ratio", 0.0, math.inf, open_high=True)
        check_word(self, "continue_from", ("raw", "average"))

    def average(self, model: State, context: TrajectoryContext, memory: State) -> tuple[State, State]:
        """The mean of the window; the memory holds losses, the last models, and the sum of those that stay in it."""
        (loss,) = context.required_losses("swad")(model, {}, [0.0])
        losses = [*memory.get("losses", torch.zeros(0, dtype=torch.float64)).tolist(), loss]
        newest = len(losses) - 1
        first, end = window(losses, self.converge, self.tolerance, self.ratio)
        models: dict[int, State] = {newest: model}
        for place in range(newest - self.tolerance, newest):
            if older := prefixed(f"model{place}", memory):
                models[place] = older
        total = WeightedSum(dict(prefixed("sum", memory)), float(memory.get("number", torch.tensor(0))))
        for place in sorted(models):
            # The end may still fall among the last `tolerance` models: an older one is in the window for good.
            if place <= newest - self.tolerance:
                left = models.pop(place)
                if first is not None and first <= place < end:
                    total.add(left, 1.0)
        kept: dict[str, Tensor] = {"losses": torch.tensor(losses, dtype=torch.float64)}
        # Cloned, for the sum goes on below.
        kept |= with_prefix("sum", {name: tensor.clone() for name, tensor in total.tensors.items()})
        kept["number"] = torch.tensor(int(total.weight))
        for place, state in models.items():
            kept |= with_prefix(f"model{place}", state)
        if first is None:
            return model, kept
        for place, state in models.items():
            if first <= place < end:
                total.add(state, 1.0)
        return total.mean(), kept


def window(losses: Sequence[float], converge: int, tolerance: int, ratio: float) -> tuple[int | None, int]:
    """First model of the window, None while it has not opened, and the first one behind its end."""
    for now in range(converge - 1, len(losses)):
        segment = losses[now - converge + 1 : now + 1]
        if segment[0] > min(segment):
            continue
        opened, threshold = now - converge + 1, (1 + ratio) * sum(segment) / converge
        for later in range(max(now, tolerance - 1), len(losses)):
            if min(losses[later - tolerance + 1 : later + 1]) > threshold:
                return opened, later - tolerance + 1
        return opened, len(losses)
    return None, len(losses)
