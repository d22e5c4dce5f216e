"""RegMean++: the published name of RegMean under the merged prefix."""

from __future__ import annotations

from dataclasses import dataclass

from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register

__all__ = ["RegMeanPlusPlus"]


@register("regmean_plusplus", paper="arXiv:2508.03121")
@dataclass(frozen=True)
class RegMeanPlusPlus(FedAvg):
    """RegMean with Gram matrices of the merged model's own inputs, layer after layer, from sums of the clients.

    What has no Gram (norms, embeddings) is averaged; then :class:`~fedmerge.refine.prefix_regmean.PrefixRegMean` merges
    the matrices from the first to the last, one exchange a layer. Clients can be asked or it is refused.

    Parameters
    ----------
    shrinkage
        Factor on the off-diagonals of Grams, in [0, 1].
    ridge
        Pull towards the average, in units of the mean diagonal, above 0.
    head
        Whether the last matrix is merged so too, or averaged.
    examples
        At most so many of each client are measured; all where not given.

    Examples
    --------
    >>> RegMeanPlusPlus().refined_by
    'prefix_regmean(ridge=0.001,head=true,shrinkage=0.95)'
    """

    shrinkage: float = 0.95
    ridge: float = 1e-3
    head: bool = True
    examples: int | None = None

    def __post_init__(self) -> None:
        check_range(self, "shrinkage", 0.0, 1.0)
        check_range(self, "ridge", 1e-12, float("inf"), open_high=True)

    @property
    def refined_by(self) -> str:
        """The merge of matrices."""
        limit = "" if self.examples is None else f",examples={self.examples}"
        head = str(self.head).lower()
        return f"prefix_regmean(ridge={self.ridge!r},head={head},shrinkage={self.shrinkage!r}{limit})"
