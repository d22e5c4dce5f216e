"""Classification: one of several classes for each label, under a softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmerge.errors import InvalidOption, TaskError
from fedmerge.tasks.task import Task, by_example, units

__all__ = ["Classification"]


@dataclass(frozen=True)
class Classification(Task):
    """One class per label, cross-entropy of a softmax.

    Targets are class numbers, of the outputs' shape without the class axis ([B] of [B, C], [B, T] of [B, T, C] or
    [B, C, T], [B, H, W] of [B, C, H, W]; a further axis of size 1 is no matter), or probabilities of the outputs'
    shape. The curvature is ``diag p - p p^T`` at each position, and positions are independent.

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

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise TaskError(f"Classification: label_smoothing must be in [0, 1], got {self.label_smoothing!r}")

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
        return self._laid(outputs, targets)[0]

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Class numbers that there are, or probabilities."""
        logits, labels = self._rows(outputs, targets)
        classes = logits.shape[-1]
        if classes == 1:
            raise TaskError(
                f"outputs of shape {list(outputs.shape)} have one class, whose probability is always 1: say "
                'task="binary" for yes or no, task="regression" for numbers, or give the model an output for each class'
            )
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
        each = F.cross_entropy(
            logits, labels, reduction="none", ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
        )
        return by_example(each, targets)

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the labels that count."""
        logits, labels = self._rows(outputs, targets)
        loss = F.cross_entropy(logits, labels, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing)
        if labels.is_floating_point():
            return loss
        # torch divides zero by zero where no label counts.
        return torch.where((labels != self.ignore_index).any(), loss, logits.sum() * 0)

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

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``p - y``, y smoothed where labels are."""
        return self._difference(outputs, targets, self._rows(outputs, targets)[1], self.label_smoothing)

    def curvature(self, outputs: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """``p * j - p (p . j)``."""
        axis = self.axis(outputs, targets)
        p = outputs.softmax(axis) * self._mask(outputs, targets).to(outputs.dtype)
        # Where a label is ignored, p is 0 and so is the product.
        return p * directions - p * (p * directions).sum(axis + 1, keepdim=True)

    def output_fisher(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``diag p - p p^T``."""
        axis = self.axis(outputs, targets)
        if axis != outputs.ndim - 1:
            raise InvalidOption(
                f"the classes of outputs of shape {list(outputs.shape)} are on axis {axis}, not the last"
            )
        p = (outputs.softmax(axis) * self._mask(outputs, targets).to(outputs.dtype)).flatten(0, -2)
        return torch.diag(p.sum(0)) - p.T @ p

    def regressed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One-hot labels."""
        labels = self._rows(outputs, targets)[1]
        return self._labelled(outputs, targets, labels, 0.0) * self._mask(outputs, targets).to(outputs.dtype)

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """``sqrt(p_c) (p - e_c)`` at each position, for every class c."""
        axis = self.axis(outputs, targets)
        mask = self._mask(outputs, targets)
        p = outputs.softmax(axis)
        for one in units(p.shape[1:], p.device):
            position = one.any(axis, keepdim=True) & mask
            chosen = (p * one).sum(axis, keepdim=True)  # p_c, and 0 at other positions
            yield torch.where(position, p - one.to(p.dtype), torch.zeros_like(p)) * chosen.sqrt()

    def sampled(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """``p - y`` at a label drawn for each position."""
        p = self._rows(outputs, targets)[0].softmax(-1)
        drawn = torch.multinomial(p.cpu().double(), 1, generator=generator)
        return self._difference(outputs, targets, drawn.flatten().to(p.device), 0.0)

    def _difference(self, outputs: Tensor, targets: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """``p - y`` for labels of all positions, 0 where the target is ignored."""
        p = outputs.softmax(self.axis(outputs, targets))
        y = self._labelled(outputs, targets, labels, smoothing)
        return (p - y) * self._mask(outputs, targets).to(p.dtype)

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
        axis, targets = self._laid(outputs, targets)
        logits = outputs.movedim(axis, -1).flatten(0, -2)
        if targets.is_floating_point():
            return logits, targets.movedim(axis, -1).flatten(0, -2)
        return logits, targets.flatten().long()

    def _laid(self, outputs: Tensor, targets: Tensor) -> tuple[int, Tensor]:
        """The class axis, and targets of the outputs' shape with or without it."""
        shape = list(outputs.shape)
        ends = {1, len(shape) - 1} if self.class_axis is None else {self.class_axis % max(1, len(shape))}
        if len(shape) < 2 or 0 in ends:
            raise TaskError(
                f"outputs of shape {shape} have no class axis besides the batch: a model with one output per example "
                'is told by task="binary" (0 or 1) or task="regression"'
            )
        if targets.is_floating_point():
            if targets.shape == outputs.shape:
                return min(ends), targets  # probabilities, as torch lays them
            raise TaskError(
                f"targets of {targets.dtype} and shape {list(targets.shape)} are no class numbers for outputs of shape "
                f'{shape}: pass whole numbers, or say task="regression" or task="binary"'
            )
        squeezed = [targets, *(targets.squeeze(i) for i in (1, -1) if targets.ndim > 1 and targets.shape[i] == 1)]
        for labels in squeezed:
            fits = [axis for axis in sorted(ends) if [*shape[:axis], *shape[axis + 1 :]] == list(labels.shape)]
            if len(fits) > 1 and self.where_unclear is not None:
                return self.where_unclear % len(shape), labels
            if len(fits) > 1:
                raise TaskError(
                    f"outputs of shape {shape} have as many classes as positions, so that labels of shape "
                    f"{list(targets.shape)} do not tell the class axis: say task=Classification(class_axis=1), or -1"
                )
            if fits:
                return fits[0], labels
        if len(shape) == 2 and len(outputs) == targets.numel() and 1 in ends:
            return 1, targets  # positions of all examples in one axis
        raise TaskError(
            f"labels of shape {list(targets.shape)} are not those of outputs of shape {shape}: want the outputs' shape "
            "without its class axis, which is axis 1 or the last"
        )
