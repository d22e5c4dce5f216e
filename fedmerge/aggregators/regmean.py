"""RegMean: the linear layers whose outputs on the clients' own inputs change least."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Fold
from fedmerge.curvature.collected import report_averaged
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State, WeightedSum
from fedmerge.statistics import Gram, Statistic
from fedmerge.statistics.measuring.weight_matrices import WeightMatrix
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["RegMean"]

log = logging.getLogger("fedmerge")


@dataclass
class _Layer:
    """``sum_i c_i G_i`` and ``sum_i c_i W_i G_i`` of one weight, float64, and how many clients are in them."""

    matrix: WeightMatrix
    grams: Tensor
    products: Tensor
    clients: int = 1


@dataclass
class _Total:
    states: WeightedSum = field(default_factory=WeightedSum)
    layers: dict[str, _Layer] = field(default_factory=dict)
    clients: int = 0

    def add(self, name: str, layer: _Layer) -> None:
        """Add to the layer of that name, where it is the same kind of layer."""
        known = self.layers.get(name)
        if known is None:
            self.layers[name] = layer
        elif known.matrix == layer.matrix:
            known.grams += layer.grams
            known.products += layer.products
            known.clients += layer.clients


@register("regmean", paper="arXiv:2212.09849")
@dataclass(frozen=True)
class RegMean(Fold[_Total]):
    """Layers that reproduce every client's outputs on its own inputs as well as one matrix can.

    Jin et al. 2023, eq. 2: ``min_W sum_i c_i E ||W x_i - W_i x_i||^2``, hence
    ``W = (sum_i c_i W_i G_i) (sum_i c_i G_i)^-1`` with the Gram matrix G_i = E x_i x_i^T of the layer's
    inputs, its off-diagonal shrunk. Here also for convolutions, whose inputs are unfolded patches, and with
    the bias as a last column; a ridge draws directions without inputs to the average. What has no Gram (norms,
    embeddings) is averaged. Identity or equal Grams give FedAvg.

    Parameters
    ----------
    shrinkage
        Factor on the off-diagonal of each Gram, in [0, 1]; alpha in the paper. 0 weighs each input alone.
    ridge
        In units of the mean of the summed Gram's diagonal, at least 0, for linear layers.
    ridge_convolution
        The same for convolutions, whose overlapping patches determine less than their number suggests.
    normalize
        Which Grams are divided by their trace, so that only examples weigh clients and not how large their
        activations grew: those of ``"convolution"``, ``"all"`` or ``"none"``, which is the paper.
    """

    separable = "layer"
    shrinkage: float = 0.9
    ridge: float = 0.01
    ridge_convolution: float = 0.3
    normalize: Literal["convolution", "all", "none"] = "none"

    def __post_init__(self) -> None:
        check_range(self, "shrinkage", 0.0, 1.0)
        check_range(self, "ridge", 0.0, float("inf"), open_high=True)
        check_range(self, "ridge_convolution", 0.0, float("inf"), open_high=True)
        if self.normalize not in ("convolution", "all", "none"):
            raise InvalidOption(f'RegMean: normalize must be "convolution", "all" or "none", got {self.normalize!r}')

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Gram matrices of layer inputs."""
        return (Gram(),)

    def zero(self, context: MergeContext) -> _Total:
        """No client yet."""
        return _Total()

    def add(self, total: _Total, update: ClientUpdate, context: MergeContext) -> _Total:
        """Add one client's Grams, and its weights times them."""
        total.states.add(update.state, update.weight)
        total.clients += 1
        for name, gram in update.statistic("gram").items():
            matrix = WeightMatrix.measured_by(name, gram, update.state)
            full = gram.double().reshape(matrix.groups, matrix.columns, matrix.columns)
            diagonal = torch.diag_embed(full.diagonal(dim1=-2, dim2=-1))
            if self.normalize == "all" or (self.normalize == "convolution" and matrix.is_convolution):
                trace = float(diagonal.sum())
                full, diagonal = (g / trace if trace > 0 else g for g in (full, diagonal))
            share = update.weight * (self.shrinkage * full + (1 - self.shrinkage) * diagonal)
            product = matrix.gather(update.state).double() @ share
            total.add(name, _Layer(matrix, share, product))
        return total

    def join(self, total: _Total, other: _Total) -> _Total:
        """Add the sums."""
        total.states.join(other.states)
        total.clients += other.clients
        for name, layer in other.layers.items():
            total.add(name, layer)
        return total

    def finish(self, total: _Total, context: MergeContext, memory: State) -> tuple[State, State]:
        """Solve every layer."""
        merged = total.states.mean()
        report_averaged("regmean", merged, total.layers)
        for name, layer in total.layers.items():
            if layer.clients < total.clients:
                log.warning("regmean: the Gram of %r is not the same for all clients: averaged instead", name)
                continue
            ridge = self.ridge_convolution if layer.matrix.is_convolution else self.ridge
            merged.update(_solved(layer, merged, ridge))
        return merged, {}


def _solved(layer: _Layer, mean: State, ridge: float) -> dict[str, Tensor]:
    """``W = M + (R - M S) (S + ridge)^-1``: a move from the mean M, none where S has no inputs."""
    start = layer.matrix.gather(mean).double()
    move = layer.products - start @ layer.grams
    unit = float(layer.grams.diagonal(dim1=-2, dim2=-1).mean())
    identity = torch.eye(layer.matrix.columns, dtype=torch.float64, device=move.device)
    factor, failed = torch.linalg.cholesky_ex(layer.grams + ridge * unit * identity)
    if ridge > 0 and unit > 0 and not failed.any():
        solution = torch.cholesky_solve(move.transpose(-1, -2), factor).transpose(-1, -2)
    else:  # singular: the smallest move
        solution = move @ torch.linalg.pinv(layer.grams + ridge * unit * identity, hermitian=True)
    return layer.matrix.scatter(start + solution)
