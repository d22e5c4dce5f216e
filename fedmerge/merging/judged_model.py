"""The model that a round ends with, where it is an average over rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fedmerge.questions import Ask, Question, Trust
from fedmerge.questions.pooling import added_up, sifted
from fedmerge.state import State, cast_like, prefixed, with_prefix
from fedmerge.trajectories import Trajectory, TrajectoryContext
from fedmerge.trajectories.trajectory import Losses, check_widths

__all__ = ["GOES_ON", "going_on", "judged", "losses_of_clients"]

GOES_ON = "goes-on"
"""Below it, the pipeline's memory holds the model that clients train from, where another one is judged."""


def judged(
    trajectories: Sequence[Trajectory],
    state: dict[str, Tensor],
    averaged: Sequence[str],
    context: Callable[[State], TrajectoryContext],
    memory: State,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model that a round ends with, and what is to be remembered.

    Parameters
    ----------
    trajectories
        In order; the second one averages what the first one makes.
    state
        The merged model, all tensors of it.
    averaged
        Names of what is averaged: parameters that are trained, and statistics of norms.
    context
        Makes what a trajectory may use, given the model as it stands.
    memory
        The pipeline's, of the round before.
    """
    kept: dict[str, Tensor] = {}
    goes_on = ends = state
    for place, trajectory in enumerate(trajectories):
        model = {name: ends[name] for name in averaged}
        recalled = prefixed(f"trajectory{place}", memory)
        check_widths(model, recalled)
        mean, own = trajectory.average(model, context(ends), recalled)
        kept |= with_prefix(f"trajectory{place}", own)
        ends = {**ends, **cast_like(mean, model)}
        if trajectory.continue_from == "average":
            goes_on = ends
    if goes_on is not ends:
        kept |= with_prefix(GOES_ON, {name: goes_on[name] for name in averaged})
    # The model that is handed out may be changed by whoever gets it; what is remembered may not.
    return ends, {name: tensor.clone() for name, tensor in kept.items()}


def going_on(memory: State) -> State:
    """Tensors that clients train from instead of the model that was judged; none where it is the same."""
    return prefixed(GOES_ON, memory)


def losses_of_clients(
    ask: Ask, clients: Sequence[int], whole: State, trust: Trust, told: Mapping[int, float] | None
) -> Losses:
    """Has `clients` judge models that differ from `whole` in some tensors."""

    def losses(state: State, direction: State, factors: Sequence[float]) -> list[float]:
        points = tuple((factor,) if direction else () for factor in factors)
        question = Question({**whole, **cast_like(state, whole)}, (direction,) if direction else (), points)
        answered = ask([question], clients)
        good, _refused = sifted([question], answered, trust, told, clients)
        (answer,) = added_up([question], good, trust)
        means: list[float] = answer.loss.tolist()
        return means

    return losses
