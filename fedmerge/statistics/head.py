"""What a linear output layer sees: sums of features, by themselves and against labels, and the loss gradient there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption, TaskError
from fedmerge.models.resize import copy_of
from fedmerge.registry import register
from fedmerge.state import State, frozen_names
from fedmerge.statistics.layer_statistic import Bounded
from fedmerge.statistics.measuring.measurable import Measurable
from fedmerge.statistics.measuring.taps import Probe, probe, stored_dtype
from fedmerge.statistics.measuring.weight_matrices import (
    MatrixLayer,
    WeightMatrix,
    bias_of,
    check_factor_shape,
    symmetric,
)
from fedmerge.statistics.sending.laws import Breach, cancelling, labelled
from fedmerge.statistics.sending.soundness import FIXED_POINT, semidefinite
from fedmerge.statistics.statistic_type import Batches, Shapes
from fedmerge.tasks import Task, reading_of
from fedmerge.training.report import TrainingReport

__all__ = ["HeadGradient", "HeadStatistic", "HeadSums", "gives"]

_Sums = Callable[[Task, Tensor, Tensor, Tensor], dict[str, Tensor]]


class _NoHead(InvalidOption):
    """There is no linear output layer whose sums would mean anything."""


@dataclass(frozen=True)
class HeadStatistic(Bounded):
    """Measured at the linear layer that gives the model's outputs."""

    of_labels: ClassVar[bool] = True
    square: ClassVar[tuple[str, str]]
    """The part that holds second moments, and whether of inputs (``"A"``) or of outputs (``"G"``)."""
    other: ClassVar[str]
    """The part that has a row for each output."""

    def answer(self, model: nn.Module, batches: Batches, own: nn.Module | None, directions: Sequence[State]) -> State:
        """:meth:`measure`, or nothing where there is no such layer: the step is skipped then, and no client fails."""
        try:
            return self.measure(model, batches, None)
        except _NoHead:
            return {}

    def means(self, model: nn.Module, batches: Batches, sums: _Sums) -> State:
        """Means over labels of what `sums` adds up of the task, input rows, outputs and targets.

        Labels that are to be ignored add nothing, and are among those that are divided by: so the means of clients add
        up by their numbers of examples.
        """
        total: dict[str, Tensor] = {}
        count, weight = 0, ""
        for matrix, task, rows, outputs, targets in self._rows(model, batches):
            means = sums(task, rows, outputs, targets)
            total = {part: tensor + total[part] if part in total else tensor for part, tensor in means.items()}
            count, weight = count + len(rows), matrix.weight
        # Rounded once there is noise on them: before, a rounded mean of many examples could tell one from another.
        dtype = stored_dtype(model) if self.clip is None else torch.float64
        return {f"{weight}.{part}": (tensor / count).to(dtype) for part, tensor in total.items()}

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """Both matrices of one weight, of its sizes; nothing of a frozen one."""
        if not shapes:
            return
        (square, side), other = self.square, self.other
        weight = next(iter(shapes)).rpartition(".")[0]
        if set(shapes) != {f"{weight}.{square}", f"{weight}.{other}"} or weight not in state:
            raise InvalidOption(
                f"statistic {self.name!r}: want {square} and {other} of one weight, got {list(shapes)[:6]}"
            )
        check_factor_shape(self.name, weight, side, shapes[f"{weight}.{square}"], state)
        if len(shapes[f"{weight}.{square}"]) != 2 or state[weight].ndim != 2:
            raise InvalidOption(f"statistic {self.name!r}: {weight!r} is the weight of no linear layer")
        rows, *columns = shapes[f"{weight}.{other}"] or (0,)
        inputs = shapes[f"{weight}.S"][-1:] if square == "S" else _row_lengths(weight, state)
        if rows != len(state[weight]) or len(columns) != 1 or columns[0] not in inputs:
            raise InvalidOption(f"statistic {self.name!r}: {other} of {weight!r} has shape {[rows, *columns]}")

    def doubt(self, shapes: Shapes, state: State, model: Measurable) -> str | None:
        """Another weight than one of a layer, or another column for the bias."""
        for name, shape in shapes.items():
            wanted = model.factor_shape(name.rpartition(".")[0], "A", state)
            if wanted is None:
                return f"{name!r} is of no linear layer that the model trains"
            if name.rpartition(".")[2] != "G" and shape[-1:] != wanted[-1:]:
                return f"{name!r} has rows of {shape[-1]} numbers, those of the model's layer have {wanted[-1]}"
        return None

    def check(self, value: State, state: State) -> None:
        """Real numbers, finite and bounded, of one head's sizes; the second moments as every Gram matrix is.

        Where examples are clipped, noise may have been added, which makes second moments indefinite, and no more
        symmetric: they are only to be finite and bounded then, and :meth:`~fedmerge.statistics.NoisySums.check` bounds
        the noise.
        """
        super().check(value, state)
        for name, tensor in value.items():
            if self.clip is None and name.rpartition(".")[2] == self.square[0]:
                semidefinite(self.name, name, tensor, FIXED_POINT)

    def _rows(self, model: nn.Module, batches: Batches) -> Iterator[tuple[WeightMatrix, Task, Tensor, Tensor, Tensor]]:
        """The head's matrix, the task, and of each batch the head's input rows, 0 where no label counts, in float64,
        the outputs, in float64, and the targets.

        Nothing where the head is frozen: there is none to fit.
        """
        probed: Probe | None = None
        tasks = reading_of(self.task).of(model, batches)
        for inputs, targets in self.limited(batches):
            probed = probed or probe(model, inputs, lambda _: True)
            with torch.no_grad():
                outputs, tapped = probed.forward(inputs)
            task = tasks(inputs, outputs, targets)
            position = next((i for i, taps in enumerate(tapped) if gives(taps.outputs, outputs)), None)
            if position is None and _ends_frozen(model, inputs):
                return
            if position is None or not isinstance(probed.layers[position].module, nn.Linear):
                raise _NoHead(f"statistic {self.name!r}: the model's outputs are not those of a linear layer")
            layer: MatrixLayer = probed.layers[position]
            rows = layer.input_rows(tapped[position].inputs[0]).flatten(0, 2).double()
            outputs = (
                tapped[position].outputs[0].detach().double()
            )  # the same numbers, with the axis that the model may have dropped
            if self.clip is not None:
                if len(rows) != len(targets):
                    raise InvalidOption(f"statistic {self.name!r}: an example with several labels cannot be clipped")
                if task.residual_bound is None or not (task.exclusive or outputs.shape[-1] == 1):
                    raise TaskError(f"statistic {self.name!r}: the residuals of {task} have no bound for noise to hide")
                # Of an example whose features overflow nothing is left, or it would spoil the sum for all to see.
                rows, outputs = (numbers.nan_to_num(0.0, 0.0, 0.0) for numbers in (rows, outputs))
                rows = rows * (self.clip / rows.norm(dim=1, keepdim=True).clamp_min(self.clip))
            kept = task.kept(outputs, targets).flatten(0, -2)
            if bool((kept.any(1) != kept.all(1)).any()):
                raise _NoHead(f"statistic {self.name!r}: of some examples only some of the labels are to be ignored")
            yield layer.matrix, task, rows * kept[:, :1], outputs, targets


def _ends_frozen(model: nn.Module, inputs: Tensor) -> bool:
    """Whether a model's outputs are those of a linear layer that is not trained."""
    frozen = frozen_names(model)
    if not frozen:
        return False
    tapped: dict[str, list[Tensor]] = {}
    copied = copy_of(model).eval()
    for name, module in copied.named_modules():
        if isinstance(module, nn.Linear) and (f"{name}.weight" if name else "weight") in frozen:
            calls = tapped.setdefault(name, [])
            module.register_forward_hook(lambda _module, _args, output, calls=calls: calls.append(output))
    with torch.no_grad():
        outputs = copied(inputs)
    return any(gives(calls, outputs) for calls in tapped.values())


def gives(calls: list[Tensor], outputs: Tensor) -> bool:
    """Whether a layer called once gave the outputs, up to axes of size 1."""
    if len(calls) != 1 or calls[0].numel() != outputs.numel():
        return False
    first, other = ([size for size in tensor.shape if size != 1] for tensor in (calls[0], outputs))
    same = calls[0].reshape(outputs.shape) if first == other else None
    return same is not None and bool(((same == outputs) | (same.isnan() & outputs.isnan())).all())


@register("head_sums")
@dataclass(frozen=True)
class HeadSums(HeadStatistic):
    """Second moments of the head's inputs h (a final 1 where it has a bias), and of labels against them.

    ``S = mean h h^T`` [d, d] under ``<weight>.S``, ``C = mean onehot(y) h^T`` [classes, d] under ``<weight>.C``: all
    that ridge regression of one-hot labels on features needs. ``4 d (d + classes)`` bytes. Rows of C are the classes'
    mean features times their frequency. In other tasks the place of one-hot labels is taken by -1 and 1 for no and yes,
    or by the numbers that are regressed; weighted classes count by their weight in both.

    Parameters
    ----------
    layers, examples, clip
        See :class:`~fedmerge.statistics.sending.noise.Bounded`.

    Examples
    --------
    >>> value = HeadSums().measure(nn.Linear(2, 2, bias=False), [(torch.eye(2), torch.tensor([0, 1]))], None)
    >>> value["weight.S"].tolist(), value["weight.C"].tolist()
    ([[0.5, 0.0], [0.0, 0.5]], [[0.5, 0.0], [0.0, 0.5]])
    """

    name: ClassVar[str] = "head_sums"
    moments: ClassVar[tuple[str, ...]] = ("S",)
    square: ClassVar[tuple[str, str]] = ("S", "A")
    other: ClassVar[str] = "C"

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure in one forward pass, in evaluation mode, on a copy."""
        return self.means(model, batches, _moments)

    def identities(self, value: State) -> Mapping[str, Breach]:
        """Those of one-hot labels and of features with a final 1."""
        weights = [name.removesuffix(".S") for name in value if name.endswith(".S")]
        return {f"moments of features and labels at {w}": labelled(value[f"{w}.S"], value[f"{w}.C"]) for w in weights}

    def label_weight(self, value: State) -> float:
        """The mean square of the final 1, where features and labels go together as they do with one."""
        for weight in [name.removesuffix(".S") for name in value if name.endswith(".S")]:
            parts = labelled(value[f"{weight}.S"], value[f"{weight}.C"])
            return float(value[f"{weight}.S"][-1, -1]) if parts.size > 0 and parts.error < 1 else 0.0
        return 0.0

    def bounds(self) -> Mapping[str, float]:
        """``|h h^T| = |h|^2`` and ``|onehot(y) h^T| = |h|``."""
        clip = float("inf") if self.clip is None else self.clip
        return {"S": clip**2, "C": clip}


@register("head_gradient")
@dataclass(frozen=True)
class HeadGradient(HeadStatistic):
    """Mean gradient of the task's loss by the head's matrix, and the Fisher of its outputs.

    ``<weight>.gradient`` [classes, d] and ``<weight>.G`` [classes, classes], of classes ``mean diag(p) - p p^T``: a few
    hundredths of most models.

    Parameters
    ----------
    layers, examples, clip
        See :class:`~fedmerge.statistics.sending.noise.Bounded`.
    """

    name: ClassVar[str] = "head_gradient"
    moments: ClassVar[tuple[str, ...]] = ("G",)
    square: ClassVar[tuple[str, str]] = ("G", "G")
    other: ClassVar[str] = "gradient"

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure in one forward pass, in evaluation mode, on a copy."""
        return self.means(model, batches, _gradient_and_fisher)

    def identities(self, value: State) -> Mapping[str, Breach]:
        """Probabilities add up to 1, and so do labels: rows of the gradient, and of the Fisher, add up to 0."""
        return {name: cancelling(tensor) for name, tensor in value.items() if len(tensor) > 1}

    def bounds(self) -> Mapping[str, float]:
        """``|p - y| <= sqrt(2)``; the eigenvalues of ``diag(p) - p p^T`` are at most 1/2 and add up to less than 1."""
        clip = float("inf") if self.clip is None else self.clip
        return {"gradient": 2**0.5 * clip, "G": 0.5**0.5}


def _moments(task: Task, rows: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    weights = task.row_weights(outputs, targets)
    weighted = rows if weights is None else rows * weights[:, None]
    return {"S": symmetric(weighted.T @ rows), "C": task.regressed(outputs, targets).flatten(0, -2).T @ weighted}


def _gradient_and_fisher(task: Task, rows: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    fisher = symmetric(task.output_fisher(outputs, targets))
    return {"gradient": task.residual(outputs, targets).flatten(0, -2).T @ rows, "G": fisher}


def _row_lengths(weight: str, state: State) -> tuple[int, ...]:
    """Inputs of a linear layer, a final 1 for its bias among them or not."""
    size = state[weight].shape[1]
    return (size, size + 1) if bias_of(weight) in state else (size,)
