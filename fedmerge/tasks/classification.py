"""Classification: one of several classes for each label, under a softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmerge.errors import InvalidOption, TaskError
from fedmerge.registry import register
from fedmerge.tasks.label_shapes import by_example, laid, units
from fedmerge.tasks.metric import Decisions
from fedmerge.tasks.task import Task

__all__ = ["Classification"]


@register("classification")
@dataclass(frozen=True)
class Classification(Task):
    """One class for each label, cross-entropy of a softmax; several labels an example, as in segmentation, too.

    Targets are class numbers, of the outputs' shape without the class axis ([B] of [B, C], [B, T] of [B, T, C] or
    [B, C, T], [B, H, W] of [B, C, H, W]; a further axis of size 1 is no matter), or probabilities of the outputs'
    shape. The curvature is ``diag p - p p^T`` at each position, times the weight of its label's class, and positions
    are independent.

    Parameters
    ----------
    class_axis
        Which axis of the outputs the classes are on, batches on axis 0. Where not given it is read from the targets'
        shape; where both axis 1 and the last would do, it has to be.
    ignore_index
        The label that marks what does not count.
    label_smoothing
        As in ``torch.nn.CrossEntropyLoss``, in [0, 1]: it moves what is learnt, and leaves the curvature as it is.
    where_unclear
        The class axis where both 1 and the last would do: 1 for torch's own losses. An error where not given.
    class_weights
        One for each class, as ``weight`` of ``torch.nn.CrossEntropyLoss``: what a label of this class counts. Means
        are divided by the weights of the labels.
    metrics
        See :class:`~fedmerge.tasks.Task`.

    Examples
    --------
    >>> outputs, targets = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, -100]])
    >>> task = Classification(class_axis=-1)
    >>> task.hits(outputs, targets).tolist(), task.labels(outputs, targets).tolist()
    ([1], [1])
    """

    class_axis: int | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    where_unclear: int | None = None
    class_weights: tuple[float, ...] | None = None

    exclusive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise TaskError(f"Classification: label_smoothing must be in [0, 1], got {self.label_smoothing!r}")
        if self.class_weights is not None:
            weights = tuple(float(weight) for weight in self.class_weights)
            object.__setattr__(self, "class_weights", weights)
            if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
                raise TaskError(f"Classification: class_weights must be zero or more, got {weights}")

    @property
    def residual_bound(self) -> float | None:
        """``sqrt(2)``, but with class weights."""
        return 2**0.5 if self.class_weights is None else None

    def axis(self, outputs: Tensor, targets: Tensor) -> int:
        """The class axis, from 1 up.

        Raises
        ------
        TaskError
            The shapes do not belong together, or do not tell.

        Examples
        --------
        >>> Classification().axis(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))
        1
        """
        return laid(outputs, targets, self.class_axis, self.where_unclear)[0]

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Class numbers that there are, or probabilities."""
        logits, labels = self._rows(outputs, targets)
        classes = logits.shape[-1]
        if classes == 1:
            raise TaskError(
                f"outputs of shape {list(outputs.shape)} have one class, whose probability is always 1: say "
                'task="binary" for yes or no, task="regression" for numbers, or give the model an output for each class'
            )
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise TaskError(f"{len(self.class_weights)} class_weights are given for {classes} classes: give one each")
        if labels.is_floating_point():
            if bool(
                ((labels < 0) | ~torch.isclose(labels.sum(-1, keepdim=True), labels.new_ones(()), atol=1e-3)).any()
            ):
                raise TaskError(f"targets of shape {list(targets.shape)} are no probabilities of {classes} classes")
            return
        bad = labels[((labels < 0) | (labels >= classes)) & (labels != self.ignore_index)]
        if len(bad):
            raise TaskError(
                f"labels must be whole numbers from 0 to {classes - 1}, as many as there are outputs, or "
                f"{self.ignore_index} where they do not count, got {int(bad[0])}"
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy."""
        logits, labels = self._rows(outputs, targets)
        each = F.cross_entropy(logits, labels, reduction="none", **self._options(logits))
        return by_example(each, targets)

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the labels that count, each times its weight."""
        logits, labels = self._rows(outputs, targets)
        loss = F.cross_entropy(logits, labels, **self._options(logits))
        if labels.is_floating_point():
            return loss
        # torch divides zero by zero where no label counts.
        count = (labels != self.ignore_index).any() if self.class_weights is None else self.weight(outputs, targets) > 0
        return torch.where(count, loss, logits.sum() * 0)

    def weight(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Weights of the labels that count. Of probabilities the mean is over positions, as torch has it."""
        labels = self._rows(outputs, targets)[1]
        kept = self._kept(outputs, targets)
        if self.class_weights is None or labels.is_floating_point():
            return kept.sum()
        return self._of_classes(outputs)[labels[kept]].sum()

    def labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Those that are not to be ignored."""
        return by_example(self._kept(outputs, targets), targets)

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Where the largest output is the label's."""
        logits, labels = self._rows(outputs, targets)
        wanted = labels.argmax(-1) if labels.is_floating_point() else labels
        right = (logits.argmax(-1) == wanted) & self._kept(outputs, targets)
        return by_example(right, targets)

    def kept(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Positions whose label is not to be ignored."""
        return self._mask(outputs, targets).expand_as(outputs)

    def known(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Labels of each class."""
        logits, labels = self._rows(outputs, targets)
        if labels.is_floating_point():
            return labels.argmax(-1).bincount(minlength=logits.shape[-1])
        return labels[self._kept(outputs, targets)].bincount(minlength=logits.shape[-1])

    def decisions(self, outputs: Tensor, targets: Tensor) -> Decisions:
        """The class of the largest output."""
        logits, labels = self._rows(outputs, targets)
        kept, classes = self._kept(outputs, targets), logits.shape[-1]
        logits, labels = logits[kept], labels[kept]
        true = labels.argmax(-1) if labels.is_floating_point() else labels
        chosen, truths = (F.one_hot(index, classes).bool() for index in (logits.argmax(-1), true))
        return Decisions(logits.softmax(-1), chosen, truths, torch.ones_like(truths))

    def expected(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Probabilities of the classes."""
        return outputs.softmax(self.axis(outputs, targets))

    def as_outputs(self, expected: Tensor) -> Tensor:
        """Their logarithms."""
        return expected.clamp_min(torch.finfo(expected.dtype).tiny).log()

    def surprise(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy without smoothing and weights."""
        logits, labels = self._rows(outputs, targets)
        return F.cross_entropy(logits, labels, reduction="sum", ignore_index=self.ignore_index)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``s p - w y``: y smoothed where labels are, w the weights of the classes, s the sum of ``w y``."""
        labels = self._labelled(outputs, targets, self._rows(outputs, targets)[1], self.label_smoothing)
        axis = self.axis(outputs, targets)
        weighted = labels * self._of_classes(outputs, axis)
        p = outputs.softmax(axis)
        return (p * weighted.sum(axis, keepdim=True) - weighted) * self._mask(outputs, targets).to(p.dtype)

    def seen(self, outputs: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """Less the change of the likeliest class: a softmax does not see what is added to all logits.

        Where a model is sure, ``j^T F j`` lies far below what ``p_c j_c^2`` of that class rounds to.
        """
        axis = self.axis(outputs, targets)
        likeliest = outputs.argmax(axis, keepdim=True)
        return directions - directions.gather(axis + 1, likeliest.expand(len(directions), *likeliest.shape))

    def curvature(self, outputs: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """``s (p * j - p (p . j))``."""
        axis = self.axis(outputs, targets)
        p, scale = outputs.softmax(axis), self._scale(outputs, targets)
        return scale * (p * directions - p * (p * directions).sum(axis + 1, keepdim=True))

    def output_fisher(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``s (diag p - p p^T)``."""
        axis = self.axis(outputs, targets)
        if axis != outputs.ndim - 1:
            raise InvalidOption(
                f"the classes of outputs of shape {list(outputs.shape)} are on axis {axis}, not the last"
            )
        p = outputs.softmax(axis).flatten(0, -2)
        scaled = p * self._scale(outputs, targets).reshape(-1, 1)
        return torch.diag(scaled.sum(0)) - scaled.T @ p

    def row_weights(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Weights of the labels' classes."""
        return None if self.class_weights is None else self._scale(outputs, targets).flatten()

    def regressed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One-hot labels."""
        labels = self._rows(outputs, targets)[1]
        return self._labelled(outputs, targets, labels, 0.0) * self._mask(outputs, targets).to(outputs.dtype)

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """``sqrt(s p_c) (p - e_c)`` at each position, for every class c."""
        axis = self.axis(outputs, targets)
        p, scale = outputs.softmax(axis), self._scale(outputs, targets)
        for unit in units(p.shape[1:], p.device):
            position = unit.any(axis, keepdim=True)
            chosen = (p * unit).sum(axis, keepdim=True) * scale  # s p_c, and 0 at other positions
            yield torch.where(position, p - unit.to(p.dtype), torch.zeros_like(p)) * chosen.sqrt()

    def sampled(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """``sqrt(s) (p - y)`` at a label drawn for each position."""
        rows = self._rows(outputs, targets)[0].softmax(-1)
        drawn = torch.multinomial(rows.cpu().double(), 1, generator=generator).flatten().to(rows.device)
        p = outputs.softmax(self.axis(outputs, targets))
        return (p - self._labelled(outputs, targets, drawn, 0.0)) * self._scale(outputs, targets).sqrt()

    def _options(self, logits: Tensor) -> dict[str, Any]:
        """Keywords of torch's loss."""
        weight = None if self.class_weights is None else logits.new_tensor(self.class_weights)
        return {"weight": weight, "ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}

    def _of_classes(self, outputs: Tensor, axis: int = 0) -> Tensor:
        """The classes' weights, laid along an axis of the outputs; 1 where there are none."""
        if self.class_weights is None:
            return outputs.new_ones(())
        shape = [-1 if i == axis else 1 for i in range(outputs.ndim)] if axis else [-1]
        return outputs.new_tensor(self.class_weights).view(shape)

    def _scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the curvature at each position is multiplied by: the weight of its label, 0 where it is ignored.

        Smoothed labels of weighted classes have the mean weight that they give to the classes.
        """
        mask = self._mask(outputs, targets).to(outputs.dtype)
        if self.class_weights is None:
            return mask
        axis = self.axis(outputs, targets)
        labels = self._labelled(outputs, targets, self._rows(outputs, targets)[1], self.label_smoothing)
        return (labels * self._of_classes(outputs, axis)).sum(axis, keepdim=True) * mask

    def _labelled(self, outputs: Tensor, targets: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """One-hot labels [n], or probabilities [n, C], of all positions in the outputs' shape."""
        axis = self.axis(outputs, targets)
        moved = outputs.movedim(axis, -1)
        classes = moved.shape[-1]
        hot = labels if labels.is_floating_point() else F.one_hot(labels.clamp(0, classes - 1), classes)
        y = (1 - smoothing) * hot.to(outputs.dtype) + smoothing / classes
        return y.view(moved.shape).movedim(-1, axis)

    def _mask(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Which positions count, in the outputs' shape with a class axis of size 1."""
        axis = self.axis(outputs, targets)
        shape = [1 if i == axis else size for i, size in enumerate(outputs.shape)]
        return self._kept(outputs, targets).view(shape)

    def _kept(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Which labels count, [n]."""
        labels = self._rows(outputs, targets)[1]
        if labels.is_floating_point():
            return torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        return labels != self.ignore_index

    def _rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, C], and labels [n] or [n, C], of all positions, ignored ones too."""
        axis, targets = laid(outputs, targets, self.class_axis, self.where_unclear)
        logits = outputs.movedim(axis, -1).flatten(0, -2)
        if targets.is_floating_point():
            return logits, targets.movedim(axis, -1).flatten(0, -2)
        return logits, targets.flatten().long()
