"""Gaussian heads: LDA, naive Bayes or QDA from the clients' class sums and second moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register

__all__ = ["GaussianHeads"]


@register("gaussian_heads", paper="arXiv:2602.01186")
@dataclass(frozen=True)
class GaussianHeads(FedAvg):
    """A Gaussian classifier of all clients' features as head, from class sums and second moments; the rest is averaged.

    Linear discriminant analysis is FedCGS's head (arXiv:2503.06962); naive Bayes and quadratic analysis give the linear
    head that fits features drawn from the classes' Gaussians, as FedPFT does (arXiv:2402.01862). See
    :class:`~fedmerge.refine.gaussian_head.GaussianHead`. Clients can be asked or it is refused.

    Parameters
    ----------
    classifier, shrinkage, samples, seed
        See there.

    Examples
    --------
    >>> GaussianHeads().refined_by
    'gaussian_head(classifier=lda,shrinkage=0.01,samples=200,seed=0)'
    """

    classifier: Literal["lda", "naive_bayes", "qda"] = "lda"
    shrinkage: float = 0.01
    samples: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "shrinkage", 0.0, 1.0)
        check_range(self, "samples", 1, float("inf"), open_high=True)
        if self.classifier not in ("lda", "naive_bayes", "qda"):
            raise InvalidOption(f"GaussianHeads: unknown classifier {self.classifier!r}: lda, naive_bayes or qda")

    @property
    def refined_by(self) -> str:
        """The classifier."""
        options = {"classifier": self.classifier, "shrinkage": self.shrinkage, "samples": self.samples}
        return f"gaussian_head({','.join(f'{k}={v}' for k, v in options.items())},seed={self.seed})"
