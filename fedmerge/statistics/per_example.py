"""Squared per-example gradients of any parameters, by torch.func: for what no tap serves."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

__all__ = ["add_squares"]

_BUDGET = 1 << 24  # numbers held at once


def add_squares(
    total: dict[str, Tensor], model: nn.Module, names: Mapping[str, str], inputs: Tensor, vectors: Tensor
) -> None:
    """Add ``sum_b sum_v (J_b^T v_b)^2`` to `total`, parameter by parameter.

    Parameters
    ----------
    total
        Sums so far, float64.
    model
        In evaluation mode; its examples must not depend on each other.
    names
        Parameters to differentiate by: the name in `total`, and the one in `model`.
    inputs
        [B, ...].
    vectors
        [V, B, ...]: vectors v at the outputs.
    """
    parameters = dict(model.named_parameters())
    chosen = {own: parameters[own].detach() for own in names.values()}

    def squares(one: Tensor, its_vectors: Tensor) -> dict[str, Tensor]:
        pull = vjp(lambda parameters: functional_call(model, parameters, (one[None],))[0], chosen)[1]
        gradients = vmap(lambda vector: pull(vector)[0])(its_vectors)
        return {name: g.square().sum(0) for name, g in gradients.items()}

    size = sum(parameter.numel() for parameter in chosen.values()) * len(vectors)
    step = max(1, _BUDGET // max(1, size))
    with warnings.catch_warnings():
        # Operators without a batching rule of their own are slower, and right.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        for start in range(0, len(inputs), step):
            rows = slice(start, start + step)
            found = vmap(squares, in_dims=(0, 1), randomness="different")(inputs[rows], vectors[:, rows])
            for name, own in names.items():
                total[name] += found[own].detach().double().sum(0)
