"""What a task is: a loss per example, what counts as right, and the likelihood that curvature is measured against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedmerge.inputs import call
from fedmerge.tasks.metric import Decisions, Metric, metrics_of
from fedmerge.tasks.own_loss import derive_likelihood

__all__ = ["Estimator", "Task", "as_batch"]

Estimator = Literal["auto", "exact", "sampled", "empirical"]

_MOST_OUTPUTS = 128  # above, one backward pass per output is out of all proportion


@dataclass(frozen=True)
class Task(ABC):
    """What a model's outputs say of its targets: subclasses are frozen dataclasses, one a file of this folder.

    All methods take outputs [B, ...] and targets [B, ...] of a batch, and raise
    :class:`~fedmerge.errors.TaskError` where their shapes do not belong together. An example may have several labels,
    one for each position; labels that are to be ignored count nowhere. What a subclass inherits of the likelihood of
    another loss than its own is derived from its loss, or refused: see :mod:`fedmerge.tasks.own_loss`.

    Parameters
    ----------
    metrics
        What models are judged by besides the loss and the accuracy: names (``"f1"``, ``"auroc"``, ``"iou"``, ``"mae"``,
        ``"rmse"``, ``"r2"``, ``"perplexity"``), ``"module:function"``, functions of outputs and targets, or a
        :class:`~fedmerge.tasks.Metric`. Those that are usual for the task where not given.
    """

    kind: ClassVar[str] = "task"
    lowest_loss: ClassVar[float] = 0.0
    """Less than this no example loses: who says that one does lies."""
    usual_metrics: ClassVar[tuple[str, ...]] = ()
    """Those by which models are judged where none are given; the first is the main one where there is no accuracy."""
    exclusive: ClassVar[bool] = False
    """Whether exactly one of the classes is true, as opposed to yes and no for each."""

    # What a model is judged by does not change what it is asked to do: tasks that differ in it are equal.
    metrics: tuple[Any, ...] | None = field(default=None, kw_only=True, repr=False, compare=False)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        derive_likelihood(cls)

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """The model's outputs for a batch: a tensor, a tuple of arguments, or a mapping of keywords.

        A task of one's own may take the logits here out of whatever the model returns.

        Examples
        --------
        >>> from fedmerge.tasks import Regression
        >>> Regression().forward(nn.Bilinear(1, 1, 1), (torch.zeros(5, 1), torch.zeros(5, 1))).shape
        torch.Size([5, 1])
        """
        return model(inputs) if isinstance(inputs, Tensor) else call(model, inputs)

    def outputs_for(self, targets: Tensor, classes: int) -> int:
        """How many outputs a model needs for such targets [n, ...] of so many classes."""
        return classes

    @property
    def residual_bound(self) -> float | None:
        """The longest that an example's :meth:`residual` can be, None where it can be of any length; with it go the
        bounds of the output Fisher that noise is made for, see :class:`~fedmerge.statistics.HeadGradient`."""
        return None

    @property
    def measured(self) -> tuple[Metric, ...]:
        """The metrics, built."""
        return metrics_of(self.usual_metrics if self.metrics is None else self.metrics)

    @abstractmethod
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Make sure that the targets' values can be labels of such outputs, for whoever has not yet.

        Raises
        ------
        TaskError
            They cannot.
        """

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each example, up to a constant: [B], summed over its labels."""

    @abstractmethod
    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What training minimises, as torch's own loss has it: the mean over the batch's labels; 0 without any."""

    @abstractmethod
    def labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How many labels of each example count, [B]."""

    @abstractmethod
    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """How many labels of each example the outputs decide rightly, [B]; None where nothing is decided."""

    def decisions(self, outputs: Tensor, targets: Tensor) -> Decisions | None:
        """What is decided for each label, for metrics that count decisions; None where nothing is decided."""
        return None

    def expected(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean of the likelihood at these outputs, probabilities or numbers: what an ensemble averages.

        The outputs themselves where nothing is known of it.
        """
        return outputs

    def as_outputs(self, expected: Tensor) -> Tensor:
        """Outputs whose :meth:`expected` are these."""
        return expected

    def errors(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Predicted and true numbers [n, outputs], for metrics of numbers; None where outputs are none."""
        return None

    def surprise(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Negative log-likelihood, summed over the labels that count, of one class for each label; None where labels
        are none."""
        return None

    def weight(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the mean of :meth:`mean_loss` divides by: the labels that count, each times its weight."""
        return self.labels(outputs, targets).sum()

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What adds up over batches and clients, float64.

        ``loss``, ``weight`` and ``labels``, ``hits`` where something is decided, and a tensor for each metric, by its
        name: ``loss / weight`` is the mean loss, ``hits / labels`` the accuracy.
        """
        outputs = as_batch(outputs)
        weight = self.weight(outputs, targets).double()
        labels = self.labels(outputs, targets).sum().double()
        added = {"loss": self.mean_loss(outputs, targets).double() * weight, "weight": weight, "labels": labels}
        hits = self.hits(outputs, targets)
        if hits is not None:
            added["hits"] = hits.sum().double()
        return added | {metric.name: metric.sums(self, outputs, targets).double() for metric in self.measured}

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss, accuracy (where there are hits) and every metric, of what :meth:`sums` has added up; NaN where nothing
        was added that would tell.

        Examples
        --------
        >>> from fedmerge.tasks import Regression
        >>> task = Regression(metrics=("mae",))
        >>> task.figures(task.sums(torch.tensor([[3.0], [1.0]]), torch.tensor([1.0, 1.0])))
        {'loss': 2.0, 'mae': 1.0}
        """
        figures = {"loss": _ratio(sums["loss"], sums["weight"])}
        if "hits" in sums:
            figures["accuracy"] = _ratio(sums["hits"], sums["labels"])
        return figures | {metric.name: float(metric.value(sums[metric.name])) for metric in self.measured}

    @abstractmethod
    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of :meth:`losses` by the outputs, in their shape."""

    @abstractmethod
    def curvature(self, outputs: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """The Fisher of the outputs times `directions` [m, B, ...]: ``E_y[v v^T] J``, v the :meth:`residual` at y."""

    def seen(self, outputs: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """`directions` [m, B, ...] without what changes no likelihood, which would only cost digits; all by default."""
        return directions

    @abstractmethod
    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Vectors v [B, ...], one per output, whose sum of ``v v^T`` is the Fisher of the outputs."""

    @abstractmethod
    def sampled(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """:meth:`residual` at labels drawn from the model's own distribution."""

    @abstractmethod
    def output_fisher(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The Fisher of outputs on the last axis, [C, C], summed over examples and positions."""

    @abstractmethod
    def regressed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What a least-squares fit of the outputs aims at, in their shape; 0 where labels are ignored."""

    def kept(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Which outputs have a label that counts, in their shape; all by default."""
        return torch.ones_like(outputs, dtype=torch.bool)

    def row_weights(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """What each position counts in a least-squares fit of the outputs, [n]; None where all count alike."""
        return None

    def known(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How many examples tell about each class, [C]; by default all tell about every output."""
        axis = {1: 0, 3: 2}.get(outputs.ndim, 1)  # channels of pictures are on axis 1
        return torch.full((outputs.shape[axis] if axis else 1,), len(outputs))

    def vectors(
        self, outputs: Tensor, targets: Tensor, estimator: Estimator, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Vectors v [B, ...] with ``F = mean_x sum_v (J^T v)(J^T v)^T``, J the Jacobian of the outputs.

        Parameters
        ----------
        outputs, targets
            Of a batch; which labels are ignored is read from the targets, their values only by ``"empirical"``.
        estimator
            ``"exact"``: the expectation over the model's own label distribution, one v per output. ``"sampled"``: one
            label drawn from it. ``"empirical"``: the label given. ``"auto"``: exact up to 128 outputs of an example,
            as in classification, else sampled, as in sequences.
        generator
            Of labels, on the CPU.

        Raises
        ------
        TaskError
            Labels are to be drawn for a loss whose distribution is not known.
        """
        if estimator == "auto":
            estimator = "exact" if outputs[0].numel() <= _MOST_OUTPUTS else "sampled"
        outputs = outputs.detach()
        if estimator == "exact":
            yield from self.exact(outputs, targets)
        elif estimator == "sampled":
            yield self.sampled(outputs, targets, generator)
        else:
            yield self.residual(outputs, targets)


def _ratio(total: Tensor, count: Tensor) -> float:
    """A mean; 0 of nothing."""
    return float(total) / float(count) if float(count) else 0.0


def as_batch(outputs: Tensor) -> Tensor:
    """Outputs with the axis of examples that ``squeeze()`` has taken from a batch of one.

    Examples
    --------
    >>> as_batch(torch.tensor(3.0))
    tensor([3.])
    """
    return outputs.reshape(1) if outputs.ndim == 0 else outputs
