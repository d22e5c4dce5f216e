"""Several labels that may all be true at once: yes or no for each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmerge.errors import TaskError
from fedmerge.registry import register
from fedmerge.tasks.binary import Binary

__all__ = ["Multilabel"]


@register("multilabel")
@dataclass(frozen=True)
class Multilabel(Binary):
    """Yes or no for each of several labels, any number of which may be true, binary cross-entropy of sigmoids.

    Outputs and targets are [B, C]. Accuracy is that of single answers; F1 and AUROC are means over labels.

    Parameters
    ----------
    ignore_index, pos_weight, metrics
        See :class:`~fedmerge.tasks.Binary`.

    Examples
    --------
    >>> import torch
    >>> Multilabel().hits(torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[1, 0, 0]])).tolist()
    [2]
    """

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Yes or no for each output, of several."""
        super().check(outputs, targets)
        if outputs.ndim < 2:
            raise TaskError(
                f'outputs of shape {list(outputs.shape)} hold one answer for each example: say task="binary", or give '
                "the model an output for each label"
            )
