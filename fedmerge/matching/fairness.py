"""How much say each client has in what is matched with what: enough to be heard, too little to decide for all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmerge.state import State, accumulator_dtype

__all__ = ["anchor_of", "bounded", "normalised", "shares_of", "typical"]

_LOUDEST = 3.0  # times the clients' median size: what is larger is matched as if it were no larger
_FARTHEST = 3.0  # times the usual distance from the clients' median: beyond it a client is no example for the others
_ALIKE = 0.05  # of a layer's size: nearer than that, clients look the same
_LEAST = 1e-30  # of the most examples of a client: nothing is divided by zero, nor overflows in float32
_HEAVIEST = 2.0  # times the clients' median number of examples
_QUANTILES = 9
_SIDE = 512  # rows and columns by which directions are compared
_SAMPLED = 4096  # entries of a tensor that are compared one by one


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1, none of them 0, whatever numbers clients tell.

    Examples
    --------
    >>> normalised([1e308, 1e308]), min(normalised([1e60, 5e-324]))
    ([0.5, 0.5], 1e-30)
    """
    largest = max(weights)
    parts = [max(w / largest, _LEAST) for w in weights]
    return [part / sum(parts) for part in parts]


def shares_of(weights: Sequence[float]) -> list[float]:
    """Shares that sum to 1, in which no client of three or more has more say than two usual ones.

    Examples
    --------
    >>> shares_of([1.0, 1.0, 2.0]), shares_of([1.0, 1.0, 2.0**63]), shares_of([3.0, 1.0])
    ([0.25, 0.25, 0.5], [0.25, 0.25, 0.5], [0.75, 0.25])
    """
    parts = normalised(weights)
    if len(parts) > 2:
        most = _HEAVIEST * _middle(parts)
        parts = [min(part, most) for part in parts]
    total = sum(parts)
    return [part / total for part in parts]


def bounded(states: Sequence[State]) -> list[dict[str, Tensor]]:
    """Models for matching: in one dtype, and no tensor far larger than it is at most clients.

    Neurons are matched by products and distances, in which the largest numbers decide: here nobody's are more than
    three times the median of all. What is merged is not touched.

    Parameters
    ----------
    states
        With the same names; widths may differ, so that sizes are root mean squares.

    Examples
    --------
    >>> loud = bounded([{"w": torch.ones(2)}, {"w": torch.ones(2)}, {"w": torch.full((2,), 1e15)}])[2]["w"]
    >>> loud.round().tolist()
    [3.0, 3.0]
    """
    if len(states) < 2:
        return [dict(state) for state in states]
    bounded_states: list[dict[str, Tensor]] = [{} for _ in states]
    for name, first in states[0].items():
        dtype = first.dtype
        for state in states[1:]:
            dtype = torch.promote_types(dtype, state[name].dtype)
        tensors = [state[name].to(dtype) for state in states]
        sizes = [_size(tensor) for tensor in tensors]
        most = _LOUDEST * _middle(sizes)
        for state, tensor, size in zip(bounded_states, tensors, sizes, strict=True):
            state[name] = tensor * (most / size) if size > most else tensor
    return bounded_states


def typical(states: Sequence[State]) -> list[int]:
    """Numbers of the clients whose layers look like most clients' do, in whatever order their neurons are.

    A layer looks like its quantiles of the neurons' sizes, and like how far they all point in one direction: dead,
    equal and huge neurons show, those of another order or width do not. With one or two clients nobody can tell.

    Examples
    --------
    >>> good = [{"w": torch.randn(8, 8)} for _ in range(4)]
    >>> typical([{"w": torch.zeros(8, 8)}, *good])[0]
    1
    """
    return _typical(_distances(states), len(states[0]))


def anchor_of(states: Sequence[State], weights: Sequence[float], sizes: Sequence[int] | None = None) -> int:
    """The client that the others are brought into the order of: of two the heavier, of more the most typical one.

    How many examples a client has is what it says; how far its model is from most is seen.

    Parameters
    ----------
    states, weights
        Of the clients.
    sizes
        Of their models, where widths differ: the largest of the typical ones comes first.

    Examples
    --------
    >>> anchor_of([{"w": torch.ones(2)}, {"w": torch.ones(2)}], [1.0, 3.0])
    1
    """
    distances = _distances(states)
    rounded = (distances.sum(0) / (_ALIKE * max(1, len(states[0])))).round().tolist()
    close = _typical(distances, len(states[0]))
    return max(close, key=lambda i: (sizes[i] if sizes else 0, -rounded[i], weights[i], -i))


def _typical(distances: Tensor, layers: int) -> list[int]:
    most = (_FARTHEST * distances.median(1, keepdim=True).values).clamp_min(_ALIKE * layers)
    close: list[int] = (distances <= most).all(0).nonzero().ravel().tolist()
    return close or [int(distances.sum(0).argmin())]


def _distances(states: Sequence[State]) -> Tensor:
    """[2, clients], by looks and entry by entry, summed over layers, each relative to the size of the median one."""
    distances = torch.zeros(2, len(states), dtype=torch.float64)
    if len(states) < 3:
        return distances
    for name in states[0]:
        looks = [torch.stack([_look(state[name]) for state in states])]
        if len({state[name].shape for state in states}) == 1:  # clients that started together are near each other
            looks.append(torch.stack([_sampled(state[name]) for state in states]))
        for kind, look in enumerate(looks):
            middle = look.median(0).values
            usual = look.norm(dim=1).median()
            distances[kind] += (look - middle).norm(dim=1) / usual.clamp_min(1e-30)
    return distances


def _middle(numbers: Sequence[float]) -> float:
    """The lower median."""
    return sorted(numbers)[(len(numbers) - 1) // 2]


def _sampled(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)].double().cpu()


def _size(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    numbers = tensor.to(accumulator_dtype(tensor.dtype))
    return float(torch.linalg.vector_norm(numbers)) / math.sqrt(tensor.numel())


def _look(tensor: Tensor) -> Tensor:
    """[quantiles + 1], none of which changes where neurons are re-ordered."""
    quantiles = torch.linspace(0, 1, _QUANTILES, dtype=torch.float64)
    if not tensor.numel():
        return torch.zeros(_QUANTILES + 1, dtype=torch.float64)
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    matrix = (tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.reshape(-1, 1)).detach()
    matrix = matrix.to(accumulator_dtype(tensor.dtype))
    rows = matrix.norm(dim=1).double().cpu() / matrix.shape[1] ** 0.5
    largest = rows.max().clamp_min(1e-30)
    if tensor.ndim < 2:
        return torch.cat([torch.quantile(rows, quantiles), torch.zeros(1, dtype=torch.float64)])
    part = matrix[:: 1 + len(matrix) // _SIDE, :: 1 + matrix.shape[1] // _SIDE]
    unit = part / largest.to(part) / part.numel() ** 0.5
    products = unit @ unit.T if unit.shape[0] <= unit.shape[1] else unit.T @ unit
    alike = products.norm().double().cpu() / unit.square().sum().double().cpu().clamp_min(1e-30)
    return torch.cat([torch.quantile(rows, quantiles), (alike * rows.square().mean().sqrt())[None]])
