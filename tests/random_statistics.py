"""Curvature as clients might have measured it: random, positive, and fitting a state."""

from __future__ import annotations

import torch

from fedmerge.layout import Layout
from fedmerge.state import State
from fedmerge.statistics.measuring.weight_matrices import bias_of


def random_diagonal(state: State, seed: int) -> dict[str, torch.Tensor]:
    """A positive number for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(state[n].shape, generator=generator) + 0.1 for n in Layout.of(state).parameters}


def random_factor(size: int, generator: torch.Generator) -> torch.Tensor:
    """A positive definite matrix, well conditioned."""
    rows = torch.randn(2 * size + 2, size, generator=generator)
    return rows.T @ rows / len(rows) + 0.1 * torch.eye(size)


def random_grams(state: State, seed: int) -> dict[str, torch.Tensor]:
    """A Gram matrix for every weight with two axes or more, bias included where there is one."""
    generator = torch.Generator().manual_seed(seed)
    return {n: random_factor(_columns(state, n), generator) for n in _weights(state)}


def random_kfac(state: State, seed: int) -> dict[str, torch.Tensor]:
    """Both factors of every weight with two axes or more."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in _weights(state):
        found[f"{name}.A"] = random_factor(_columns(state, name), generator)
        found[f"{name}.G"] = random_factor(len(state[name]), generator)
    return found


def _weights(state: State) -> list[str]:
    names = Layout.of(state).parameters
    return [n for n in names if n.endswith("weight") and state[n].ndim >= 2 and state[n].numel()]


def _columns(state: State, weight: str) -> int:
    return state[weight][0].numel() + (bias_of(weight) in state)
