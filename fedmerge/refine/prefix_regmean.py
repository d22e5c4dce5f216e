"""RegMean layer by layer, with Grams of the inputs that the merged model itself gives each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedmerge.lookup.option_checks import check_range
from fedmerge.refine.refinement import Step
from fedmerge.refine.sequential_refit import RefitStep, SequentialRefit
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import PrefixSums, Statistic

__all__ = ["PrefixRegMean"]


@register("prefix_regmean", paper="arXiv:2508.03121")
@dataclass(frozen=True)
class PrefixRegMean(SequentialRefit):
    """Every layer in turn by RegMean, where its inputs are those that the layers merged before it give.

    RegMean++ (Nguyen et al. 2025): ``W = (sum_i W_i G_i + l W_0) (sum_i G_i + l I)^-1`` with the Gram G_i of client
    i's examples under the merged layers below, its off-diagonals shrunk, and a pull l towards the merged W_0. One
    exchange a layer, in which clients send G_i and ``W_i G_i``, of which only sums are used. The whole is judged once,
    after the last layer: all of it, half of the way, or none. :class:`~fedmerge.refine.SequentialRefit` takes the
    client's own pre-activations in the place of ``W_i`` times merged inputs.

    Parameters
    ----------
    ridge, head, examples
        See :class:`~fedmerge.refine.SequentialRefit`; the head is merged too, unless told otherwise.
    shrinkage
        Factor on the off-diagonals, in [0, 1].
    """

    head: bool = True
    shrinkage: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "shrinkage", 0.0, 1.0)

    def steps(self, state: State) -> tuple[Step, ...]:
        """One for every weight matrix."""
        weights = self.weights(state)
        return tuple(PrefixStep(w, w == weights[-1], self.ridge, self.examples, self.shrinkage) for w in weights)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Sums at every layer."""
        return (PrefixSums(examples=self.examples, shrinkage=self.shrinkage),)


@dataclass(frozen=True)
class PrefixStep(RefitStep):
    """One layer; the last of them lets clients choose."""

    measured: ClassVar[str] = "prefix_sums"

    shrinkage: float

    def needs(self) -> tuple[Statistic, ...]:
        """Sums at this layer."""
        return (PrefixSums(layers=(self.weight,), examples=self.examples, shrinkage=self.shrinkage),)
