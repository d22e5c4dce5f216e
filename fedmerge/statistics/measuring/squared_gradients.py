"""Sums of squared gradients, example by example: in closed form where a tap serves a layer, by vmap elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from fedmerge.inputs import changed, rows, tensors_of
from fedmerge.statistics.measuring.taps import Tapped
from fedmerge.statistics.measuring.weight_matrices import MatrixLayer, example_gradients

__all__ = ["SquaredGradients", "add_squares"]


@dataclass
class SquaredGradients:
    """``sum_b sum_v (sum_t g_t a_t^T)^2``, [groups, out / groups, d], over the vectors v added so far.

    With a single position t the square of the product is the product of squares, and all vectors share one
    matrix product at the end; else every example's gradient is formed.
    """

    layer: MatrixLayer
    rows: list[Tensor]
    _sum: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def of(cls, layer: MatrixLayer, taps: Tapped) -> SquaredGradients:
        """Nothing added yet, for what the taps of a forward pass saw."""
        return cls(layer, layer.rows(taps.inputs))

    @property
    def _single(self) -> bool:
        return len(self.rows) == 1 and self.rows[0].shape[2] == 1

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add one vector's gradients at the outputs of every call."""
        if self._single:
            self._sum = self._sum + self.layer.output_rows(gradients[0]).square()
        else:
            self._sum = self._sum + example_gradients(self.layer, self.rows, gradients).square_().sum(0).double()

    def total(self) -> Tensor:
        """The sum, in float64."""
        if not self._single:
            return self._sum
        squares = self.rows[0].square()  # [B, groups, 1, d]
        return torch.einsum("bgto,bgtd->god", self._sum, squares).double()


_BUDGET = 1 << 24  # numbers held at once


def add_squares(
    total: dict[str, Tensor], model: nn.Module, names: Mapping[str, str], inputs: Any, vectors: Tensor
) -> None:
    """Add ``sum_b sum_v (J_b^T v_b)^2`` to `total`, parameter by parameter.

    Models that ``torch.vmap`` cannot follow (a GRU, decisions by value, writing into a buffer) are differentiated
    one example and one vector at a time, which is slower and gives the same.

    Parameters
    ----------
    total
        Sums so far, float64.
    model
        In evaluation mode; its examples must not depend on each other.
    names
        Parameters to differentiate by: the name in `total`, and the one in `model`.
    inputs
        [B, ...], or several of them in a tuple or mapping.
    vectors
        [V, B, ...]: vectors v at the outputs.
    """
    try:
        if any(not tensor.ndim or len(tensor) != vectors.shape[1] for tensor in tensors_of(inputs)):
            raise NotImplementedError("what all examples share has no example axis to map over")
        squares = _together(model, list(names.values()), inputs, vectors)
    except (RuntimeError, NotImplementedError, ValueError):  # ValueError of a nest that torch does not know
        squares = _one_by_one(model, list(names.values()), inputs, vectors)
    for name, own in names.items():
        total[name] += squares[own]


def _together(model: nn.Module, names: list[str], inputs: Any, vectors: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    chosen = {own: parameters[own].detach() for own in names}

    def squares(gradient: Any, its_vectors: Tensor) -> dict[str, Tensor]:
        shape = its_vectors.shape[1:]
        batch = (changed(gradient, lambda tensor: tensor[None]),)
        pull = vjp(lambda parameters: functional_call(model, parameters, batch).reshape(shape), chosen)[1]
        gradients = vmap(lambda vector: pull(vector)[0])(its_vectors)
        return {name: g.square().sum(0) for name, g in gradients.items()}

    size = sum(parameter.numel() for parameter in chosen.values()) * len(vectors)
    step = max(1, _BUDGET // max(1, size))
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in chosen.items()}
    with warnings.catch_warnings():
        # Operators without a batching rule of their own are slower, and right.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        for start in range(0, vectors.shape[1], step):
            piece = slice(start, start + step)
            sums_of_piece = vmap(squares, in_dims=(0, 1), randomness="different")(
                rows(inputs, piece), vectors[:, piece]
            )
            for name, value in sums_of_piece.items():
                sums[name] += value.detach().double().sum(0)
    return sums


def _one_by_one(model: nn.Module, names: list[str], inputs: Any, vectors: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    sums = {name: torch.zeros_like(parameters[name], dtype=torch.float64) for name in names}
    for i in range(vectors.shape[1]):
        with torch.enable_grad():
            output = model(rows(inputs, slice(i, i + 1))).reshape(vectors.shape[2:])
        for vector in vectors[:, i]:
            gradients = torch.autograd.grad(output, chosen, vector, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient.double().square()
    return sums
