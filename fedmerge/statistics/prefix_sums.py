"""What RegMean needs of a layer whose inputs are those of the merged model: Gram matrices, and weights times these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics.gram import Gram
from fedmerge.statistics.measuring.weight_matrices import WeightMatrix
from fedmerge.statistics.refit import RefitSums
from fedmerge.statistics.statistic_type import Batches

__all__ = ["PrefixSums"]


@register("prefix_sums")
@dataclass(frozen=True)
class PrefixSums(RefitSums):
    """Second moments S of a merged model's inputs to each layer, off-diagonals shrunk, and ``Z = W_i S``.

    W_i is the layer that the client trained itself, with its bias as a last column: sums of S and Z over clients are
    all that RegMean needs of a layer. Names, shapes and bytes are those of :class:`~fedmerge.statistics.RefitSums`.

    Parameters
    ----------
    layers, examples
        See :class:`~fedmerge.statistics.statistic_type.LayerStatistic`.
    shrinkage
        Factor on the off-diagonal of S, in [0, 1].

    Examples
    --------
    >>> merged, own = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    >>> value = PrefixSums().compare(merged, own, [(torch.eye(2), torch.zeros(2))])
    >>> bool((2 * value["weight.Z"] - own.weight).abs().max() < 1e-6)
    True
    """

    name: ClassVar[str] = "prefix_sums"

    shrinkage: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.shrinkage, bool)
            or not isinstance(self.shrinkage, int | float)
            or not 0 <= self.shrinkage <= 1
        ):
            raise InvalidOption(f"statistic {self.name!r}: shrinkage must lie in [0, 1], got {self.shrinkage!r}")

    def compare(self, model: nn.Module, own: nn.Module, batches: Batches) -> State:
        """Measure in one forward pass of the merged model, in evaluation mode, on a copy."""
        state = {name: tensor.detach() for name, tensor in own.state_dict().items()}
        problems: dict[str, Tensor] = {}
        for weight, moments in Gram(self.layers, self.examples).measure(model, batches, None).items():
            shrunk = self._shrunk(moments)
            matrix = WeightMatrix.measured_by(weight, moments, state)
            product = matrix.gather(state).to(shrunk) @ shrunk.reshape(matrix.groups, matrix.columns, matrix.columns)
            shape = (*shrunk.shape[:-2], matrix.rows, matrix.columns)
            problems |= {f"{weight}.S": shrunk, f"{weight}.Z": product.reshape(shape)}
        return problems

    def _shrunk(self, moments: Tensor) -> Tensor:
        diagonal = torch.diag_embed(moments.diagonal(dim1=-2, dim2=-1))
        return self.shrinkage * moments + (1 - self.shrinkage) * diagonal
