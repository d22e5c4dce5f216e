"""What of a model can be measured: its trained parameters, and the matrices that its layers make of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge.errors import InvalidOption
from fedmerge.layout import frozen_parts
from fedmerge.models.resize import copy_of
from fedmerge.state import State, trained_names
from fedmerge.statistics.measuring.weight_matrices import WeightMatrix, matrix_layers
from fedmerge.statistics.measuring.written_out import unroll

__all__ = ["Measurable", "check_parameter_shape", "doubted_factors", "doubted_parameters"]


@dataclass(frozen=True)
class Measurable:
    """What a model offers to be measured, read off its modules without running it.

    Parameters
    ----------
    parameters
        Names of the trained ones; of a shared one the first.
    matrices
        By weight, those of linear layers, convolutions and LSTMs. A client may find that it cannot tap one of them,
        such as one whose weight is used elsewhere too: these are all that there can be.
    norms
        Running means and variances of batch norms, but for those of frozen parts.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Embedding(4, 3))
    >>> found = Measurable.of(model)
    >>> sorted(found.matrices), found.matrices["0.weight"].columns, sorted(found.norms)
    (['0.weight'], 3, ['1.running_mean', '1.running_var'])
    """

    parameters: frozenset[str]
    matrices: Mapping[str, WeightMatrix]
    norms: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Measurable:
        """Read a model."""
        trained, copied = trained_names(model), copy_of(model)
        parameters = frozenset(name for name, _ in model.named_parameters() if name in trained)
        names = {id(parameter): name for name, parameter in copied.named_parameters()}
        still = {id(module) for part in frozen_parts(copied) for module in part.modules()}
        norms = [
            f"{name}.{part}" if name else part
            for name, module in copied.named_modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats and id(module) not in still
            for part in ("running_mean", "running_var")
        ]
        unroll(copied)
        layers = matrix_layers(copied, names, parameters.__contains__, trained)
        return cls(parameters, {layer.matrix.weight: layer.matrix for layer in layers}, frozenset(norms))

    def factor_shape(self, weight: str, side: str, state: State) -> tuple[int, ...] | None:
        """Shape of the factor of inputs (side ``"A"``) or outputs (``"G"``) of a weight as wide as in `state`; None
        where the weight makes no matrix."""
        matrix = self.matrices.get(weight)
        if matrix is None or weight not in state:
            return None
        shape = state[weight].shape
        size = shape[0] // matrix.groups if side == "G" else shape[1:].numel() + (matrix.bias is not None)
        return (matrix.groups, size, size) if matrix.groups > 1 else (size, size)


def doubted_factors(model: Measurable, shapes: Mapping[tuple[str, str], tuple[int, ...]], state: State) -> str | None:
    """Why factors of these shapes, by weight and side, are not those of the model's layers; None where they may be."""
    for (weight, side), shape in shapes.items():
        wanted = model.factor_shape(weight, side, state)
        if wanted is None:
            return f"{weight!r} is no weight of a linear layer or convolution that the model trains"
        if shape != wanted:
            return f"factor {side} of {weight!r} has shape {list(shape)}, the model's layer has {list(wanted)}"
    return None


def doubted_parameters(model: Measurable, names: Collection[str], selects: Callable[[str], bool]) -> str | None:
    """Why a number for every entry of these parameters is not what measuring the model gives; None where it may be."""
    unknown = [name for name in names if name not in model.parameters]
    if unknown:
        return f"{unknown[0]!r} is no parameter that the model trains"
    missing = [name for name in model.parameters if selects(name) and name not in names]
    return f"{min(missing)!r} is missing" if missing else None


def check_parameter_shape(statistic: str, name: str, shape: tuple[int, ...], state: State) -> None:
    """Check the shape of what belongs to a parameter, entry by entry.

    Raises
    ------
    InvalidOption
        There is no such parameter, or its shape is another.
    """
    if name not in state:
        raise InvalidOption(f"statistic {statistic!r}: the model has no parameter {name!r}")
    if shape != tuple(state[name].shape):
        raise InvalidOption(
            f"statistic {statistic!r}: {name!r} has shape {list(shape)}, the parameter has {list(state[name].shape)}"
        )
