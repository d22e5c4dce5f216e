"""The loss that clients minimise, settled at the first batch: the same in both engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.data.examples import IGNORED
from fedmerge.tasks.class_axis import check_classes, classification_of

__all__ = ["CrossEntropy"]


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy over the labels that count: ``Classification(class_axis).mean_loss``, in fewer calls.

    Parameters
    ----------
    class_axis
        Which axis of the outputs holds the classes.
    ignoring
        Whether some labels are to be ignored.

    Examples
    --------
    >>> import torch
    >>> logits, labels = torch.zeros(2, 3, 5), torch.tensor([[0] * 5, [-100] * 5])
    >>> round(float(CrossEntropy(1, ignoring=True)(logits, labels)), 4)  # log 3
    1.0986
    """

    class_axis: int
    ignoring: bool

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, outputs: Any, y: Tensor, labels: Tensor, what: str) -> CrossEntropy:
        """The loss for this model and these labels.

        Parameters
        ----------
        model, x, outputs, y
            A batch and what the model makes of it.
        labels
            All labels.
        what
            Whose they are, in front of an error.

        Raises
        ------
        InvalidOption
            They do not belong together.
        """
        task = classification_of(model, x, outputs, y, what)
        axis = task.class_axis or 0
        check_classes(labels, outputs.shape[axis], task, what)
        return cls(axis, bool((labels == IGNORED).any()))

    def rows(self, outputs: Tensor) -> Tensor:
        """Scores [labels, classes] of outputs."""
        return outputs if outputs.ndim == 2 else outputs.movedim(self.class_axis, -1).flatten(0, -2)

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch; 0 where no label counts, of which torch makes NaN."""
        logits, labels = self.rows(outputs), y.flatten()
        if self.ignoring and not bool((labels != IGNORED).any()):
            return logits.sum() * 0
        return F.cross_entropy(logits, labels)
