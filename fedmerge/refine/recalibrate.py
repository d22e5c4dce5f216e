"""Running statistics of batch norms as all clients' data have them at the merged model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedmerge.refine.refinement import Proposal, Refinement, Step, Sums
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import BatchNormSums, Statistic

__all__ = ["Recalibrate"]

_FIRST, _SECOND = ".first", ".second"


@register("recalibrate", paper="arXiv:2211.08403")
@dataclass(frozen=True)
class Recalibrate(Refinement):
    """Batch norms of the merged model measured afresh by the clients, in one exchange of a few numbers a channel.

    Running statistics of the clients' models do not fit a merged model, whose activations vary less. Clients send first
    and second moments, whose means over examples are those of all data taken together: the variance is that within
    clients plus that between them. A model without batch norm is not asked about.
    """

    measures_norms: ClassVar[bool] = True

    def steps(self, state: State) -> tuple[Step, ...]:
        """One, where there is batch norm."""
        return (RecalibrateStep(),) if any(name.rpartition(".")[2] == "running_var" for name in state) else ()

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Moments at the norms."""
        return RecalibrateStep().needs()


@dataclass(frozen=True)
class RecalibrateStep(Step):
    """Replace running means and variances."""

    prepares: ClassVar[bool] = True

    def needs(self) -> tuple[Statistic, ...]:
        """Moments of what goes into the norms."""
        return (BatchNormSums(),)

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """The statistics of all data instead of the present ones."""
        moments, direction = sums["batch_norm_sums"], {}
        for key in moments:
            if key.endswith(_FIRST):
                name = key.removesuffix(_FIRST)
                first, second = moments[key], moments[name + _SECOND]
                variance = name.removesuffix("running_mean") + "running_var"
                direction[name] = first - state[name].double()
                direction[variance] = (second - first.square()).clamp_min(0) - state[variance].double()
        return Proposal((direction,), ((0.0,), (1.0,)), 1), memory
