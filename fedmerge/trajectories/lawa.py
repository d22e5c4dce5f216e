"""The mean of the last few models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmerge.lookup.option_checks import check_count, check_word
from fedmerge.registry import register
from fedmerge.state import State, WeightedSum, prefixed, with_prefix
from fedmerge.trajectories.trajectory import ContinueFrom, Trajectory, TrajectoryContext

__all__ = ["Lawa"]


@register("lawa", paper="arXiv:2209.14981")
@dataclass(frozen=True)
class Lawa(Trajectory):
    """Judge the mean of the last `latest` global models (latest weight averaging).

    Kaddour 2022, section 3: the mean of the last k snapshots, taken every `every` rounds; of fewer, where there are
    fewer. The server keeps k models.

    Parameters
    ----------
    latest
        The paper's k, at least 1; at 1 the newest model is judged.
    every
        Rounds from one snapshot to the next, at least 1. Between two the mean stays.
    continue_from
        ``"raw"``: clients go on from the newest model, as in the paper; ``"average"``: from the mean.

    Examples
    --------
    >>> import torch
    >>> lawa, memory = Lawa(latest=2), {}
    >>> for round, value in ((1, 1.0), (2, 3.0), (3, 5.0)):
    ...     mean, memory = lawa.average({"w": torch.tensor([value])}, TrajectoryContext(round), memory)
    >>> mean["w"]
    tensor([4.])
    """

    latest: int = 10
    every: int = 1
    continue_from: ContinueFrom = "raw"

    def __post_init__(self) -> None:
        check_count(self, "latest", 1)
        check_count(self, "every", 1)
        check_word(self, "continue_from", ("raw", "average"))

    def average(self, model: State, context: TrajectoryContext, memory: State) -> tuple[State, State]:
        """The mean of the snapshots; they are the memory, the newest first."""
        snapshots: list[State] = []
        while older := prefixed(f"snapshot{len(snapshots)}", memory):
            snapshots.append(older)
        if not snapshots or (context.round - 1) % self.every == 0:
            snapshots = [model, *snapshots][: self.latest]
        total = WeightedSum()
        for snapshot in snapshots:
            total.add(snapshot, 1.0)
        kept: dict[str, Tensor] = {}
        for number, snapshot in enumerate(snapshots):
            kept |= with_prefix(f"snapshot{number}", snapshot)
        return total.mean(), kept
