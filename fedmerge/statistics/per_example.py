"""Squared per-example gradients of any parameters, by torch.func or one by one: for what no tap serves."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from fedmerge.inputs import changed, rows, tensors_of

__all__ = ["add_squares"]

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
        found = _together(model, list(names.values()), inputs, vectors)
    except (RuntimeError, NotImplementedError, ValueError):  # ValueError of a nest that torch does not know
        found = _one_by_one(model, list(names.values()), inputs, vectors)
    for name, own in names.items():
        total[name] += found[own]


def _together(model: nn.Module, names: list[str], inputs: Any, vectors: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    chosen = {own: parameters[own].detach() for own in names}

    def squares(one: Any, its_vectors: Tensor) -> dict[str, Tensor]:
        shape = its_vectors.shape[1:]
        batch = (changed(one, lambda tensor: tensor[None]),)
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
            found = vmap(squares, in_dims=(0, 1), randomness="different")(rows(inputs, piece), vectors[:, piece])
            for name, value in found.items():
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
