"""What a client's own data look like at every batch norm of a model: means and variances, or sums that pool exactly."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge.errors import InvalidOption
from fedmerge.inputs import call, examples_in
from fedmerge.layout import frozen_parts
from fedmerge.models.resize import copy_of
from fedmerge.registry import register
from fedmerge.state import State, is_norm_statistic
from fedmerge.statistics.measuring.measurable import Measurable, check_parameter_shape
from fedmerge.statistics.sending.soundness import squares
from fedmerge.statistics.statistic_type import Batches, Shapes, Statistic
from fedmerge.training.report import TrainingReport

__all__ = ["BatchNormMoments", "BatchNormSums"]


@register("batch_norm")
@dataclass(frozen=True)
class BatchNormMoments(Statistic):
    """Running statistics of every batch norm, measured afresh: ``<layer>.running_mean`` and ``.running_var``.

    One pass in training mode with the cumulative average that stochastic weight averaging uses
    (arXiv 1803.05407). It is how the server recalibrates a merged model without data of its own. A model
    without batch norm has an empty value.
    """

    name: ClassVar[str] = "batch_norm"

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure on a copy, so that `model` keeps its statistics."""
        probe = copy_of(model).eval()
        layers = _norms(probe)
        if not layers:
            return {}
        for layer in layers.values():
            # Only the batch norms see training mode: dropout would disturb what they measure.
            layer.train()
            layer.reset_running_stats()
        seen = 0
        for inputs, _ in batches:
            size = examples_in(inputs)
            if size == 1 and seen:
                continue  # a single example has no variance
            seen += size
            for layer in layers.values():
                layer.momentum = size / seen  # the cumulative average over examples
            call(probe, inputs)
        moments: dict[str, torch.Tensor] = {}
        for name, layer in layers.items():
            if layer.running_mean is not None and layer.running_var is not None:
                moments[f"{name}.running_mean" if name else "running_mean"] = layer.running_mean
                moments[f"{name}.running_var" if name else "running_var"] = layer.running_var
        return moments

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """A mean and a variance of every norm that there is one of."""
        for name, shape in shapes.items():
            layer, dot, part = name.rpartition(".")
            if not is_norm_statistic(name) or name not in state:
                raise InvalidOption(f"statistic {self.name!r}: {name!r} is of no batch norm")
            check_parameter_shape(self.name, name, shape, state)
            other = f"{layer}{dot}{'running_var' if part == 'running_mean' else 'running_mean'}"
            if other not in shapes:
                raise InvalidOption(f"statistic {self.name!r}: {other!r} is missing")

    def doubt(self, shapes: Shapes, state: State, model: Measurable) -> str | None:
        """A norm that is missing, or one too many."""
        return _doubted_norms(set(shapes), model.norms)

    def check(self, value: State, state: State) -> None:
        """Real numbers, finite and bounded, of the norms' sizes; no variance is negative."""
        super().check(value, state)
        for name, tensor in value.items():
            if name.endswith("running_var"):
                squares(self.name, name, tensor)


@register("batch_norm_sums")
@dataclass(frozen=True)
class BatchNormSums(Statistic):
    """First and second moments of what goes into every batch norm, whose means over clients are those of all data.

    ``<layer>.running_mean.first = mean x`` and ``<layer>.running_mean.second = mean x^2`` over examples and positions,
    in float64: variance is their difference, which float32 would lose where a mean is large. Every batch is normalised
    by itself on its way through the model, as :class:`BatchNormMoments` has it. A model without batch norm has an
    empty value.

    Examples
    --------
    >>> value = BatchNormSums().measure(nn.BatchNorm1d(1), [(torch.tensor([[1.0], [3.0]]), torch.zeros(2))], None)
    >>> value["running_mean.first"].item(), value["running_mean.second"].item()
    (2.0, 5.0)
    """

    name: ClassVar[str] = "batch_norm_sums"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64,)

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure in one pass, on a copy."""
        probe = copy_of(model).eval()
        layers, total, rows = _norms(probe), dict[str, Tensor](), dict[str, int]()

        def add(name: str, x: Tensor) -> None:
            flat = x.transpose(0, 1).flatten(1).double()
            for part, sums in (("first", flat.sum(1)), ("second", flat.square().sum(1))):
                key = f"{name}.{part}"
                total[key] = total[key] + sums if key in total else sums
                rows[key] = rows.get(key, 0) + flat.shape[1]

        for name, layer in layers.items():
            key = f"{name}.running_mean" if name else "running_mean"
            layer.register_forward_pre_hook(_inputs(key, add))
        for inputs, _ in batches if layers else ():
            for layer in layers.values():
                layer.train(examples_in(inputs) > 1)  # a single example has no variance: the model's own has to do
            call(probe, inputs)
        return {key: value / rows[key] for key, value in total.items()}

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """A first and a second moment of every norm that there is one of."""
        for name, shape in shapes.items():
            norm, _, part = name.rpartition(".")
            known = part in ("first", "second") and norm.rpartition(".")[2] == "running_mean" and norm in state
            if not known or shape != tuple(state[norm].shape):
                raise InvalidOption(f"statistic {self.name!r}: {name!r} {list(shape)} is of no batch norm")
            if f"{norm}.first" not in shapes or f"{norm}.second" not in shapes:
                raise InvalidOption(f"statistic {self.name!r}: {norm!r} wants a first and a second moment")

    def doubt(self, shapes: Shapes, state: State, model: Measurable) -> str | None:
        """A norm that is missing, or one too many."""
        means = {name for name in model.norms if name.endswith("running_mean")}
        return _doubted_norms({name.rpartition(".")[0] for name in shapes}, means)

    def check(self, value: State, state: State) -> None:
        """Real numbers, finite and bounded, of the norms' sizes, and no second moment below the square of the first."""
        super().check(value, state)
        for name in value:
            norm, _, part = name.rpartition(".")
            first, second = value[f"{norm}.first"].double(), value[f"{norm}.second"].double()
            if part == "second" and bool((second - first.square() < -1e-3 * second.abs()).any()):
                raise InvalidOption(f"statistic {self.name!r}: {norm!r} has a negative variance")


def _doubted_norms(claims: set[str], norms: Collection[str]) -> str | None:
    missing, unknown = set(norms) - claims, claims - set(norms)
    if missing:
        return f"{min(missing)!r} is missing"
    return f"{min(unknown)!r} is of no batch norm of the model" if unknown else None


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norms that keep running statistics, but for those of frozen parts, whose statistics stay as they are."""
    still = {id(layer) for part in frozen_parts(model) for layer in part.modules()}
    sums = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm))
    return {name: layer for name, layer in sums if layer.track_running_stats and id(layer) not in still}


def _inputs(key: str, add: Callable[[str, Tensor], None]) -> Callable[[nn.Module, Any], None]:
    return lambda module, args: add(key, args[0])
