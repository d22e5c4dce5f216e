"""What a linear output layer sees: sums of features, by themselves and against labels, and the loss gradient there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.errors import InvalidOption
from fedmerge.state import State
from fedmerge.statistics.base import Batches
from fedmerge.statistics.matrix_layers import MatrixLayer, symmetric
from fedmerge.statistics.noise import Bounded
from fedmerge.statistics.taps import Probe, probe, stored_dtype
from fedmerge.training.report import TrainingReport
from fedmerge.weights import WeightMatrix, check_factor, check_factor_shape

__all__ = ["HeadGradient", "HeadSums"]


@dataclass(frozen=True)
class _HeadStatistic(Bounded):
    """Measured at the linear layer that gives the model's outputs."""

    def _means(
        self, model: nn.Module, batches: Batches, sums: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
    ) -> State:
        """Means over examples of what `sums` adds up of input rows, logits and one-hot labels."""
        total: dict[str, Tensor] = {}
        count, weight = 0, ""
        for matrix, rows, logits, labels in self._rows(model, batches):
            found = sums(rows, logits, labels)
            total = {part: tensor + total[part] if part in total else tensor for part, tensor in found.items()}
            count, weight = count + len(rows), matrix.weight
        return {f"{weight}.{part}": (tensor / count).to(stored_dtype(model)) for part, tensor in total.items()}

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], state: State) -> None:
        """Matrices of the head's own sizes."""
        for name, shape in shapes.items():
            weight, _, part = name.rpartition(".")
            if part in ("S", "G"):
                check_factor_shape(self.name, weight, "A" if part == "S" else "G", shape, state)
            else:
                super().check_shapes({name: shape}, state)

    def _rows(self, model: nn.Module, batches: Batches) -> Iterator[tuple[WeightMatrix, Tensor, Tensor, Tensor]]:
        """The head's matrix, and of each batch its input rows, the logits, and one-hot labels, in float64."""
        probed: Probe | None = None
        for inputs, targets in self.limited(batches):
            probed = probed or probe(model, inputs, lambda _: True)
            with torch.no_grad():
                outputs, tapped = probed.forward(inputs)
            found = next((i for i, taps in enumerate(tapped) if _gives(taps.outputs, outputs)), None)
            if found is None or not isinstance(probed.layers[found].module, nn.Linear):
                raise InvalidOption(f"statistic {self.name!r}: the model's outputs are not those of a linear layer")
            layer: MatrixLayer = probed.layers[found]
            rows = layer.input_rows(tapped[found].inputs[0]).flatten(0, 2).double()
            if self.clip is not None:
                if len(rows) != len(inputs):
                    raise InvalidOption(f"statistic {self.name!r}: an example with several labels cannot be clipped")
                rows = rows * (self.clip / rows.norm(dim=1, keepdim=True).clamp_min(self.clip))
            labels = F.one_hot(targets.flatten(), outputs.shape[-1]).double()
            yield layer.matrix, rows, outputs.flatten(0, -2).double(), labels

    def _shifted(self, moments: Tensor) -> Tensor:
        """What is checked in the place of second moments: where examples are clipped, noise may have been added."""
        if self.clip is None or moments.ndim != 2 or moments.shape[0] != moments.shape[1]:
            return moments
        return (moments + moments.T) / 2 + moments.diagonal().abs().max() * torch.eye(len(moments), dtype=moments.dtype)

    def nbytes(self, model: nn.Module, example: Tensor) -> int:
        """Of the value that one example gives."""
        label = torch.zeros(len(example[:1]), dtype=torch.long)
        value = self.measure(model, [(example[:1], label)], None)
        return sum(tensor.nbytes for tensor in value.values())


def _gives(calls: list[Tensor], outputs: Tensor) -> bool:
    return len(calls) == 1 and calls[0].shape == outputs.shape and bool((calls[0] == outputs).all())


@dataclass(frozen=True)
class HeadSums(_HeadStatistic):
    """Second moments of the head's inputs h (a final 1 where it has a bias), and of labels against them.

    ``S = mean h h^T`` [d, d] under ``<weight>.S``, ``C = mean onehot(y) h^T`` [classes, d] under ``<weight>.C``: all
    that ridge regression of one-hot labels on features needs. ``4 d (d + classes)`` bytes. Rows of C are the classes'
    mean features times their frequency.

    Parameters
    ----------
    layers, examples, clip
        See :class:`~fedmerge.statistics.noise.Bounded`.

    Examples
    --------
    >>> value = HeadSums().measure(nn.Linear(2, 2, bias=False), [(torch.eye(2), torch.tensor([0, 1]))], None)
    >>> value["weight.S"].tolist(), value["weight.C"].tolist()
    ([[0.5, 0.0], [0.0, 0.5]], [[0.5, 0.0], [0.0, 0.5]])
    """

    name: ClassVar[str] = "head_sums"
    moments: ClassVar[tuple[str, ...]] = ("S",)

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure in one forward pass, in evaluation mode, on a copy."""
        return self._means(
            model, batches, lambda rows, logits, labels: {"S": symmetric(rows.T @ rows), "C": labels.T @ rows}
        )

    def bounds(self) -> Mapping[str, float]:
        """``|h h^T| = |h|^2`` and ``|onehot(y) h^T| = |h|``."""
        clip = float("inf") if self.clip is None else self.clip
        return {"S": clip**2, "C": clip}

    def check(self, value: State, state: State) -> None:
        """Finite, of one head, and of its sizes."""
        super().check(value, state)
        weight, d = _head_of(self.name, value, ("S", "C"), state)
        check_factor(self.name, weight, "A", self._shifted(value[f"{weight}.S"]), state)
        _shape(self.name, weight, value[f"{weight}.C"], (len(state[weight]), d))


@dataclass(frozen=True)
class HeadGradient(_HeadStatistic):
    """Mean gradient of the cross-entropy by the head's matrix, and the Fisher of its outputs.

    ``<weight>.gradient`` [classes, d] and ``<weight>.G = mean diag(p) - p p^T`` [classes, classes]: a few hundredths of
    most models.

    Parameters
    ----------
    layers, examples, clip
        See :class:`~fedmerge.statistics.noise.Bounded`.
    """

    name: ClassVar[str] = "head_gradient"
    moments: ClassVar[tuple[str, ...]] = ("G",)

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure in one forward pass, in evaluation mode, on a copy."""
        return self._means(model, batches, _gradient_and_fisher)

    def bounds(self) -> Mapping[str, float]:
        """``|p - y| <= sqrt(2)``; the eigenvalues of ``diag(p) - p p^T`` are at most 1/2 and add up to less than 1."""
        clip = float("inf") if self.clip is None else self.clip
        return {"gradient": 2**0.5 * clip, "G": 0.5**0.5}

    def check(self, value: State, state: State) -> None:
        """Finite, of one head, and of its sizes."""
        super().check(value, state)
        weight, d = _head_of(self.name, value, ("gradient", "G"), state)
        check_factor(self.name, weight, "G", self._shifted(value[f"{weight}.G"]), state)
        _shape(self.name, weight, value[f"{weight}.gradient"], (len(state[weight]), d))


def _gradient_and_fisher(rows: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    p = logits.softmax(-1)
    return {"gradient": (p - labels).T @ rows, "G": symmetric(torch.diag(p.sum(0)) - p.T @ p)}


def _head_of(statistic: str, value: State, parts: tuple[str, str], state: State) -> tuple[str, int]:
    """The weight that a value is about, and the length of its rows."""
    weights = {name.rpartition(".")[0] for name in value}
    weight = next(iter(weights), "")
    if len(weights) != 1 or set(value) != {f"{weight}.{part}" for part in parts} or weight not in state:
        raise InvalidOption(f"statistic {statistic!r}: want {' and '.join(parts)} of one weight, got {sorted(value)}")
    return weight, value[f"{weight}.{parts[0]}"].shape[-1]


def _shape(statistic: str, weight: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise InvalidOption(f"statistic {statistic!r}: {weight!r} wants {list(wanted)}, got {list(tensor.shape)}")
