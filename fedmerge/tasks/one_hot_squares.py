"""Classification by least squares: outputs are fitted to the scaled one-hot labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedmerge.errors import TaskError
from fedmerge.registry import register
from fedmerge.tasks.classification import Classification
from fedmerge.tasks.label_shapes import by_example

__all__ = ["OneHotSquares"]


@register("one_hot_squares", paper="arXiv:2307.08122")
@dataclass(frozen=True)
class OneHotSquares(Classification):
    """One class for each label, and the mean squared difference of the outputs from `scale` times its one-hot code.

    The loss with which Tangent Transformers (Liu et al. 2023, section 3.2) train their last layers linearised: with
    outputs affine in the parameters it is a quadratic, whose minimum is one linear system. In all else it is
    classification, and the class of the largest output is the one that is predicted.

    Parameters
    ----------
    class_axis, ignore_index, where_unclear, label_smoothing, class_weights, metrics
        See :class:`~fedmerge.tasks.Classification`.
    scale
        What the output of the right class is fitted to, positive; the others to 0. The authors' code has 15.

    Examples
    --------
    >>> import torch
    >>> OneHotSquares(scale=2.0).losses(torch.tensor([[2.0, 1.0]]), torch.tensor([0])).tolist()
    [0.5]
    """

    scale: float = 15.0

    lowest_loss: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.scale, bool) or not 0 < self.scale < float("inf"):
            raise TaskError(f"OneHotSquares: scale must be positive, got {self.scale!r}")

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squares, their mean over classes, of the labels that count."""
        logits, labels = self._rows(outputs, targets)
        hot = self._labelled(outputs, targets, labels, self.label_smoothing).movedim(self.axis(outputs, targets), -1)
        each = (logits - self.scale * hot.flatten(0, -2)).square().mean(-1) * self._kept(outputs, targets)
        if self.class_weights is not None and not labels.is_floating_point():
            each = each * self._of_classes(outputs)[labels.clamp_min(0)]
        return by_example(each, targets)
