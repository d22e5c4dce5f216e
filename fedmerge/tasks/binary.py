"""Binary decisions: a logit each, right or wrong by itself; one per example, or several as in multi-label tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmerge.errors import TaskError
from fedmerge.tasks.task import Task, by_example, like_outputs, units

__all__ = ["Binary"]


@dataclass(frozen=True)
class Binary(Task):
    """A yes or no for every output, binary cross-entropy of a sigmoid.

    Targets are 0 or 1, or probabilities between, one for each output: [B] for [B] or [B, 1], [B, C] for [B, C], [B, H,
    W] for [B, 1, H, W]. The curvature is ``p (1 - p)`` at each output, and outputs are independent.

    Parameters
    ----------
    ignore_index
        The label that marks what does not count.

    Examples
    --------
    >>> Binary().residual(torch.zeros(2, 1), torch.tensor([0, 1])).tolist()
    [[0.5], [-0.5]]
    """

    ignore_index: int = -100

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Labels from 0 to 1."""
        labels = like_outputs(targets, outputs)
        if bool((~((labels >= 0) & (labels <= 1)) & (labels != self.ignore_index)).any()):
            raise TaskError(
                f"labels of yes or no must lie from 0 to 1, got {labels.min().item()} to {labels.max().item()}: "
                'say task="regression" for other numbers, and give classes an output each'
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy."""
        labels, kept = self._labels(outputs, targets)
        each = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
        return by_example(each * kept, outputs)

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean binary cross-entropy over the labels that count."""
        labels, kept = self._labels(outputs, targets)
        each = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
        return (each * kept).sum() / kept.sum().clamp(min=1)

    def labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Those that are not to be ignored."""
        return by_example(self._labels(outputs, targets)[1], outputs).long()

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Where a logit is above 0 and its label above a half, or neither."""
        labels, kept = self._labels(outputs, targets)
        return by_example(((outputs > 0) == (labels > 0.5)) & kept.bool(), outputs)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``p - y``."""
        labels, kept = self._labels(outputs, targets)
        return (outputs.sigmoid() - labels) * kept

    def curvature(self, outputs: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """``p (1 - p) j``."""
        return self._variance(outputs, targets) * directions

    def kept(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Outputs whose label is not to be ignored."""
        return self._labels(outputs, targets)[1].bool()

    def output_fisher(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``p (1 - p)`` on the diagonal."""
        return torch.diag(self._variance(outputs, targets).flatten(0, -2).sum(0))

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """``sqrt(p (1 - p))`` at every output in turn."""
        root = self._variance(outputs, targets).sqrt()
        for one in units(outputs.shape[1:], outputs.device):
            yield root * one

    def sampled(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """``p - y`` at labels drawn for all outputs."""
        p, kept = outputs.sigmoid(), self._labels(outputs, targets)[1]
        drawn = torch.bernoulli(p.cpu().double(), generator=generator)
        return (p - drawn.to(p)) * kept

    def regressed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """-1 and 1, so that a regression's sign decides."""
        labels, kept = self._labels(outputs, targets)
        return (2 * labels - 1) * kept

    def _variance(self, outputs: Tensor, targets: Tensor) -> Tensor:
        p = outputs.sigmoid()
        return p * (1 - p) * self._labels(outputs, targets)[1]

    def _labels(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Labels in the outputs' shape and dtype, and 1 where they count, else 0."""
        labels = like_outputs(targets, outputs)
        kept = labels != self.ignore_index
        return torch.where(kept, labels, torch.zeros_like(labels)).to(outputs.dtype), kept.to(outputs.dtype)
