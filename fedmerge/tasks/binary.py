"""Binary decisions: a logit each, right or wrong by itself; one per example, or several as in multi-label tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmerge.errors import TaskError
from fedmerge.registry import register
from fedmerge.tasks.label_shapes import by_example, like_outputs, units
from fedmerge.tasks.metric import Decisions
from fedmerge.tasks.task import Task

__all__ = ["Binary"]


@register("binary")
@dataclass(frozen=True)
class Binary(Task):
    """A yes or no for every output, binary cross-entropy of a sigmoid.

    Targets are 0 or 1, or probabilities between, one for each output: [B] for [B] or [B, 1], [B, C] for [B, C], [B, H,
    W] for [B, 1, H, W]. The curvature is ``s p (1 - p)`` at each output, s its label's weight, and outputs are
    independent.

    Parameters
    ----------
    ignore_index
        The label that marks what does not count.
    pos_weight
        What a yes counts, as in ``torch.nn.BCEWithLogitsLoss``: one number for all outputs, or one for each of the
        last axis.
    metrics
        See :class:`~fedmerge.tasks.Task`; F1 and AUROC where not given.

    Examples
    --------
    >>> Binary().residual(torch.zeros(2, 1), torch.tensor([0, 1])).tolist()
    [[0.5], [-0.5]]
    """

    usual_metrics: ClassVar[tuple[str, ...]] = ("f1", "auroc")

    ignore_index: int = -100
    pos_weight: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.pos_weight is not None:
            weights = tuple(float(weight) for weight in self.pos_weight)
            object.__setattr__(self, "pos_weight", weights)
            if not weights or not all(0 < weight < float("inf") for weight in weights):
                raise TaskError(f"{type(self).__name__}: pos_weight must be above 0, got {weights}")

    def outputs_for(self, targets: Tensor, classes: int) -> int:
        """One for each answer of an example; one for pictures and longer texts of them."""
        return targets.shape[1] if targets.ndim == 2 else 1

    @property
    def residual_bound(self) -> float | None:
        """1, but where a yes has a weight of its own."""
        return 1.0 if self.pos_weight is None else None

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Labels from 0 to 1."""
        labels = like_outputs(targets, outputs)
        if self.pos_weight is not None and len(self.pos_weight) not in (
            1,
            outputs.shape[-1] if outputs.ndim > 1 else 1,
        ):
            raise TaskError(
                f"{len(self.pos_weight)} numbers of pos_weight are given for outputs of shape {list(outputs.shape)}: "
                "give one, or one for each of the last axis"
            )
        if bool((~((labels >= 0) & (labels <= 1)) & (labels != self.ignore_index)).any()):
            raise TaskError(
                f"labels of yes or no must lie from 0 to 1, got {labels.min().item()} to {labels.max().item()}: "
                'say task="regression" for other numbers, and give classes an output each'
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy."""
        labels, kept = self._labels(outputs, targets)
        each = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none", pos_weight=self._yes(outputs))
        return by_example(each * kept, outputs)

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean binary cross-entropy over the labels that count."""
        labels, kept = self._labels(outputs, targets)
        each = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none", pos_weight=self._yes(outputs))
        return (each * kept).sum() / kept.sum().clamp(min=1)

    def labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Those that are not to be ignored."""
        return by_example(self._labels(outputs, targets)[1], outputs).long()

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Where a logit is above 0 and its label above a half, or neither."""
        labels, kept = self._labels(outputs, targets)
        return by_example(((outputs > 0) == (labels > 0.5)) & kept.bool(), outputs)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``s p - w y``: w the weight of a yes, ``s = w y + 1 - y``."""
        labels, kept = self._labels(outputs, targets)
        yes = self._yes(outputs)
        weighted = labels if yes is None else labels * yes
        return (outputs.sigmoid() * (weighted + 1 - labels) - weighted) * kept

    def decisions(self, outputs: Tensor, targets: Tensor) -> Decisions:
        """Yes where a logit is above 0; a column for each of the last axis, and one where there is a single output."""
        labels, kept = self._labels(outputs, targets)
        columns = outputs.shape[-1] if outputs.ndim == 2 else 1
        scores, true, counted = (x.reshape(-1, columns) for x in (outputs.sigmoid(), labels > 0.5, kept.bool()))
        return Decisions(scores, (outputs > 0).reshape(-1, columns), true, counted)

    def expected(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Probabilities of yes."""
        return outputs.sigmoid()

    def as_outputs(self, expected: Tensor) -> Tensor:
        """Their logits."""
        return expected.logit(torch.finfo(expected.dtype).eps)

    def curvature(self, outputs: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """``s p (1 - p) j``."""
        return self._variance(outputs, targets) * directions

    def kept(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Outputs whose label is not to be ignored."""
        return self._labels(outputs, targets)[1].bool()

    def output_fisher(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``s p (1 - p)`` on the diagonal."""
        return torch.diag(self._variance(outputs, targets).flatten(0, -2).sum(0))

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """``sqrt(s p (1 - p))`` at every output in turn."""
        root = self._variance(outputs, targets).sqrt()
        for unit in units(outputs.shape[1:], outputs.device):
            yield root * unit

    def sampled(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """``sqrt(s) (p - y)`` at labels drawn for all outputs."""
        p = outputs.sigmoid()
        drawn = torch.bernoulli(p.cpu().double(), generator=generator)
        return (p - drawn.to(p)) * self._scale(outputs, targets).sqrt()

    def regressed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """-1 and 1, so that a regression's sign decides."""
        labels, kept = self._labels(outputs, targets)
        return (2 * labels - 1) * kept

    def _variance(self, outputs: Tensor, targets: Tensor) -> Tensor:
        p = outputs.sigmoid()
        return p * (1 - p) * self._scale(outputs, targets)

    def _scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the curvature of each output is multiplied by: the weight of its label, 0 where it is ignored."""
        labels, kept = self._labels(outputs, targets)
        yes = self._yes(outputs)
        return kept if yes is None else (labels * yes + 1 - labels) * kept

    def _yes(self, outputs: Tensor) -> Tensor | None:
        """What a yes counts, None where as much as a no."""
        return None if self.pos_weight is None else outputs.new_tensor(self.pos_weight)

    def _labels(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Labels in the outputs' shape and dtype, and 1 where they count, else 0."""
        labels = like_outputs(targets, outputs)
        kept = labels != self.ignore_index
        return torch.where(kept, labels, torch.zeros_like(labels)).to(outputs.dtype), kept.to(outputs.dtype)
