"""The usual metrics, each as sums that add up: F1, intersection over union, AUROC by bins, errors, perplexity."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.errors import TaskError
from fedmerge.registry import register
from fedmerge.tasks.metric import Answers, Decisions, Metric

__all__ = ["AUROC", "F1", "MAE", "R2", "RMSE", "IoU", "Perplexity"]


class _Counted(Metric):
    """A mean over classes of what right and wrong decisions say of each; classes that never occur are left out."""

    asks = "decisions"

    def sums(self, task: Answers, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of each class what is chosen rightly, chosen wrongly, and missed: [3, C]."""
        answer: Decisions = self.asked(task, outputs, targets)
        right, kept = answer.chosen & answer.truths & answer.kept, answer.kept
        return torch.stack([right, answer.chosen & ~answer.truths & kept, ~answer.chosen & answer.truths & kept]).sum(1)

    def value(self, sums: Tensor) -> float:
        """The mean; NaN where no class occurs."""
        seen = sums.sum(0) > 0
        return float(self._each(*sums[:, seen]).mean()) if bool(seen.any()) else math.nan

    @staticmethod
    @abstractmethod
    def _each(right: Tensor, wrong: Tensor, missed: Tensor) -> Tensor:
        """The figure of each class."""


@register("f1")
@dataclass(frozen=True)
class F1(_Counted):
    """Macro F1: the mean over classes, or over yes-or-no questions, of ``2 TP / (2 TP + FP + FN)``.

    Of a single yes-or-no question it is the F1 of yes. Classes that are neither true nor chosen anywhere do not count.

    Examples
    --------
    >>> from fedmerge.tasks import Binary
    >>> task, logits = Binary(metrics=("f1",)), torch.tensor([[2.0], [1.0], [-1.0]])
    >>> round(task.figures(task.sums(logits, torch.tensor([1, 0, 0])))["f1"], 3)
    0.667
    """

    name = "f1"

    @staticmethod
    def _each(right: Tensor, wrong: Tensor, missed: Tensor) -> Tensor:
        return 2 * right / (2 * right + wrong + missed)


@register("iou")
@dataclass(frozen=True)
class IoU(_Counted):
    """Mean intersection over union: the mean over classes of ``TP / (TP + FP + FN)``, as for segmentation."""

    name = "iou"

    @staticmethod
    def _each(right: Tensor, wrong: Tensor, missed: Tensor) -> Tensor:
        return right / (right + wrong + missed)


@register("auroc")
@dataclass(frozen=True)
class AUROC(Metric):
    """Area under the ROC curve, from counts of true and false by bins of the score; exact but for ties within a bin.

    Of yes-or-no questions the mean over those that have both answers; of two classes that of the second; of more the
    mean of each against the rest.

    Parameters
    ----------
    bins
        Of equal width in the logit from -``reach`` to ``reach``, where probabilities near 0 and 1 still differ.
    reach
        Logits beyond it fall into the outermost bins.

    Examples
    --------
    >>> from fedmerge.tasks import Binary
    >>> task, logits = Binary(metrics=("auroc",)), torch.tensor([[3.0], [1.0], [2.0], [-1.0]])
    >>> task.figures(task.sums(logits, torch.tensor([1, 1, 0, 0])))["auroc"]
    0.75
    """

    name = "auroc"
    asks = "decisions"
    bins: int = 1000
    reach: float = 16.0

    def __post_init__(self) -> None:
        if not self.bins >= 2 or not 0 < self.reach < math.inf:
            raise TaskError(f"metric 'auroc': want 2 bins or more and a positive reach, got {self.bins}, {self.reach}")

    def sums(self, task: Answers, outputs: Tensor, targets: Tensor) -> Tensor:
        """How many false and true labels each bin has: [2, C, bins]."""
        answer: Decisions = self.asked(task, outputs, targets)
        scores, truths, kept = answer.scores, answer.truths, answer.kept
        if scores.shape[1] == 2 and task.exclusive:
            scores, truths, kept = scores[:, 1:], truths[:, 1:], kept[:, 1:]
        places = (scores.double().logit(1e-12) / self.reach).clamp(-1, 1).add(1).mul(self.bins / 2)
        places = places.nan_to_num().long().clamp(max=self.bins - 1)
        count, columns = scores.shape[1], torch.arange(scores.shape[1], device=scores.device)
        index = (truths.long() * count + columns) * self.bins + places
        counts = index[kept].bincount(minlength=2 * count * self.bins)
        return counts.view(2, count, self.bins)

    def value(self, sums: Tensor) -> float:
        """How often a true one scores above a false one; half of those in the same bin."""
        no, yes = sums
        below = no.cumsum(1) - no / 2
        pairs = no.sum(1) * yes.sum(1)
        each = ((yes * below).sum(1) / pairs)[pairs > 0]
        return float(each.mean()) if len(each) else math.nan


class _OfNumbers(Metric):
    """Of predicted and true numbers, over all outputs."""

    asks = "errors"

    def sums(self, task: Answers, outputs: Tensor, targets: Tensor) -> Tensor:
        """See each."""
        predicted, true = (numbers.double() for numbers in self.asked(task, outputs, targets))
        return self._added(predicted - true, true)

    @staticmethod
    @abstractmethod
    def _added(errors: Tensor, true: Tensor) -> Tensor:
        """What is added up, of errors and true numbers [n, outputs]."""


@register("mae")
@dataclass(frozen=True)
class MAE(_OfNumbers):
    """Mean absolute error, in the unit of the targets."""

    name = "mae"

    @staticmethod
    def _added(errors: Tensor, true: Tensor) -> Tensor:
        return torch.stack([errors.abs().sum(), errors.new_tensor(errors.numel())])

    def value(self, sums: Tensor) -> float:
        """The mean."""
        return float(sums[0] / sums[1])


@register("rmse")
@dataclass(frozen=True)
class RMSE(_OfNumbers):
    """Root of the mean squared error, in the unit of the targets."""

    name = "rmse"

    @staticmethod
    def _added(errors: Tensor, true: Tensor) -> Tensor:
        return torch.stack([errors.square().sum(), errors.new_tensor(errors.numel())])

    def value(self, sums: Tensor) -> float:
        """The root of the mean."""
        return float((sums[0] / sums[1]).sqrt())


@register("r2")
@dataclass(frozen=True)
class R2(_OfNumbers):
    """Share of the targets' variance that is explained, mean over outputs: 1 at best, 0 for their mean.

    An output whose targets are all the same has no variance, and does not count.
    """

    name = "r2"

    @staticmethod
    def _added(errors: Tensor, true: Tensor) -> Tensor:
        return torch.stack([errors.square().sum(0), true.sum(0), true.square().sum(0), torch.ones_like(true).sum(0)])

    def value(self, sums: Tensor) -> float:
        """One minus the share that is left."""
        left, total, squares, count = sums
        variance = squares - total.square() / count
        varies = variance > 1e-12 * squares  # what subtraction leaves of equal numbers is no variance
        return float((1 - left[varies] / variance[varies]).mean()) if bool(varies.any()) else math.nan


@register("perplexity")
@dataclass(frozen=True)
class Perplexity(Metric):
    """``exp`` of the mean cross-entropy of a label, without smoothing and class weights: 1 at best."""

    name = "perplexity"
    asks = "surprise"

    def sums(self, task: Answers, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies and labels."""
        answer: Tensor = self.asked(task, outputs, targets)
        return torch.stack([answer.double(), task.labels(outputs, targets).sum().double()])

    def value(self, sums: Tensor) -> float:
        """Of the mean."""
        mean = float(sums[0] / sums[1])
        return math.exp(mean) if mean < 700 else math.inf
