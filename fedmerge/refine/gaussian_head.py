"""The output layer as a Gaussian classifier of all clients' features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedmerge.errors import InvalidOption, TaskError
from fedmerge.lookup.option_checks import check_range
from fedmerge.refine.class_gaussians import ClassGaussians, lda_weights, linear_like
from fedmerge.refine.refinement import Proposal, Refinement, Step, Sums
from fedmerge.registry import register
from fedmerge.seeding import torch_generator
from fedmerge.state import State
from fedmerge.statistics import ClassMoments, HeadSums, Statistic
from fedmerge.statistics.measuring.weight_matrices import WeightMatrix, bias_of
from fedmerge.statistics.sending.laws import labelled

__all__ = ["GaussianHead"]

_KINDS = ("lda", "naive_bayes", "qda")
_NO_CLASSES = 0.05
"""Of the sums that cancel where labels are one-hot; rounding and noise leave less."""
_SCALES = (1.0, 0.5, 0.25, 0.125)
"""Of the head: Gaussians fitted to the features that a network was trained for are too sure of themselves."""


@register("gaussian_head", paper="arXiv:2503.06962")
@dataclass(frozen=True)
class GaussianHead(Refinement):
    """The head of the Gaussian classifier of all clients' features, one Gaussian a class, from their sums.

    Linear discriminant analysis (as FedCGS) is a linear head and exact. Naive Bayes and quadratic discriminant analysis
    decide by squares, which a linear layer cannot: theirs is the head that logistic regression fits to features drawn
    from those Gaussians (as FedPFT). Scales of it, and the head as it is, are judged by held-out examples.

    Parameters
    ----------
    classifier
        ``"lda"``, ``"naive_bayes"`` or ``"qda"``.
    shrinkage
        Of covariances towards multiples of the identity, from 0 to 1; naive Bayes adds so much of the largest variance.
    samples
        Drawn of each class, where a head is fitted to them; at least 1.
    seed
        Of what is drawn.
    examples
        At most so many of each client are measured; all where not given.
    """

    classifier: Literal["lda", "naive_bayes", "qda"] = "lda"
    shrinkage: float = 0.01
    samples: int = 200
    seed: int = 0
    examples: int | None = None

    fits_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, "shrinkage", 0.0, 1.0)
        check_range(self, "samples", 1, float("inf"), open_high=True)
        if self.classifier not in _KINDS:
            raise InvalidOption(f"GaussianHead: classifier must be of {list(_KINDS)}, got {self.classifier!r}")

    def steps(self, state: State) -> tuple[Step, ...]:
        """One."""
        kind = LdaStep if self.classifier == "lda" else SampledStep
        return (kind(self),)


@dataclass(frozen=True)
class LdaStep(Step):
    """Replace the head."""

    stage: GaussianHead

    def needs(self) -> tuple[Statistic, ...]:
        """Second moments of features, and of labels against them."""
        return (HeadSums(examples=self.stage.examples),)

    def head(self, sums: State, weight: str) -> Tensor:
        """The linear head [C, d + 1]."""
        return lda_weights(sums[f"{weight}.S"], sums[f"{weight}.C"], self.stage.shrinkage)

    def check_classes(self, sums: State, weight: str) -> None:
        """Make sure that labels are classes, which their sums show.

        Raises
        ------
        TaskError
            They are not.
        """
        labels = labelled(sums[f"{weight}.S"], sums[f"{weight}.C"])
        if len(sums[f"{weight}.C"]) < 2 or labels.error > _NO_CLASSES * labels.size:
            raise TaskError(
                "a Gaussian classifier stands for classes of which one is true, and the labels are none: leave "
                "gaussian_head out (ridge_head fits numbers and yes or no)"
            )

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """The classifier at several scales instead of the head."""
        moments = sums[self.needs()[0].name]
        if not moments:
            raise InvalidOption("the output layer is frozen (requires_grad=False): there is no head to fit")
        weight = next(iter(moments)).rpartition(".")[0]
        bias = bias_of(weight)
        if next(iter(moments.values())).shape[-1] != state[weight].shape[1] + 1:
            raise InvalidOption(f"{weight!r} has no bias: a Gaussian classifier cannot stand in its place")
        self.check_classes(moments, weight)
        matrix = WeightMatrix(weight, bias, tuple(state[weight].shape))
        away = {name: -state[name].double() for name in matrix.names}
        points = ((0.0, 0.0), *((1.0, scale) for scale in _SCALES))
        return Proposal((away, matrix.scatter(self.head(moments, weight)[None])), points, 1), {}


@dataclass(frozen=True)
class SampledStep(LdaStep):
    """Replace the head by one that is fitted to what is drawn of the Gaussians."""

    def needs(self) -> tuple[Statistic, ...]:
        """Moments by class."""
        return (ClassMoments(examples=self.stage.examples, diagonal=self.stage.classifier == "naive_bayes"),)

    def check_classes(self, sums: State, weight: str) -> None:
        """Nothing: clients without classes have measured nothing."""

    def head(self, sums: State, weight: str) -> Tensor:
        """The linear head [C, d + 1]."""
        stage = self.stage
        if stage.classifier == "naive_bayes":
            gaussians = ClassGaussians.of_squares(sums[f"{weight}.C"], sums[f"{weight}.D"], stage.shrinkage)
        else:
            gaussians = ClassGaussians.of_moments(sums[f"{weight}.M"], stage.shrinkage)
        return linear_like(gaussians, stage.samples, torch_generator(stage.seed, "gaussian_head"))
