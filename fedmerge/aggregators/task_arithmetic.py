"""Task arithmetic: adding, subtracting and comparing what models have learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedmerge.aggregators.task_vector_fold import CoordinateFold, Sums
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_word
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.update import MergeContext

__all__ = ["TaskArithmetic"]


@register("task_arithmetic", paper="arXiv:2212.04089")
@dataclass(frozen=True)
class TaskArithmetic(CoordinateFold):
    """Scaled mean or sum of the clients' task vectors, which negative weights subtract.

    Ilharco et al. 2023, section 2, with ``tau_i = theta_i - theta_0``: ``theta+ = theta_0 + scale * sum_i c_i tau_i``.
    In the mean ``c_i = w_i / |sum_j w_j|``, which at scale 1 is FedAvg; in the sum of the paper the clients count one
    on average, ``c_i = K w_i / sum_j |w_j|``. What the paper calls

    - addition is ``form="sum"`` with its lambda as `scale`;
    - negation, of a model that was trained from `base` on what shall be forgotten, is ``weights=[-1]``;
    - an analogy, C + B - A, is ``weights=[1, 1, -1]``.

    To take a client of n_j examples out of an average over n, merge the average and the client's model with
    ``weights=[n, -n_j]``: the mean is that of all others, exactly.

    Parameters
    ----------
    scale
        lambda, the factor on the mean or the sum; the paper tries 0 to 1 on held-out examples.
    form
        ``"mean"``, or ``"sum"``, which is K times as long where clients agree.

    Examples
    --------
    >>> import torch
    >>> from fedmerge import ClientUpdate
    >>> base = {"w": torch.tensor([1.0])}
    >>> sent = [ClientUpdate(i, {"w": torch.tensor([value])}) for i, value in enumerate((2.0, 4.0))]
    >>> TaskArithmetic(scale=0.5, form="sum").merge(sent, MergeContext(base=base), {})[0]["w"]
    tensor([3.])
    """

    separable = "tensor"
    form: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word(self, "form", ("mean", "sum"))

    def include(self, sums: Sequence[Tensor], piece: Tensor, weight: float) -> None:
        """Add ``w_i tau_i``."""
        sums[0] += piece.mul_(weight)

    def combine(self, sums: Sequence[Tensor], total: Sums) -> Tensor:
        """Divide by the weights."""
        return sums[0] * (total.unit if self.form == "sum" else 1 / abs(total.net))

    def finish(self, total: Sums, context: MergeContext, memory: State) -> tuple[State, State]:
        """Step from the base.

        Raises
        ------
        InvalidOption
            The weights add up to nothing, of which there is no mean.
        """
        if self.form == "mean" and abs(total.net) <= 1e-9 * total.weight:
            raise InvalidOption(
                "TaskArithmetic: the weights add up to 0, so that there is no mean of the task vectors: take form=sum"
            )
        return super().finish(total, context, memory)
