"""What a method has added to frozen weights since the start: low-rank factors, which travel in their place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge.adapters.low_rank_pairs import Pair
from fedmerge.adapters.small_cores import Term, best_of_rank
from fedmerge.errors import AdapterError
from fedmerge.seeding import torch_generator
from fedmerge.state import State, accumulator_dtype

__all__ = ["added", "fresh_pair", "joined_factors", "moved_weights", "with_folded"]

_B, _A = "/folded_B", "/folded_A"


def added(weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """A weight of any shape plus ``b a``, in its own type.

    Examples
    --------
    >>> added(torch.zeros(2, 1, 2), torch.ones(2, 1), torch.ones(1, 2)).tolist()
    [[[1.0, 1.0]], [[1.0, 1.0]]]
    """
    matrix = weight.reshape(len(b), a.shape[1]).to(accumulator_dtype(weight.dtype))
    return torch.addmm(matrix, b.to(matrix), a.to(matrix)).reshape(weight.shape).to(weight.dtype)


def joined_factors(weight: str, memory: State, b: Tensor, a: Tensor) -> dict[str, Tensor]:
    """Factors of all that has been added to a weight, with `b` and `a` besides, under the names that they travel by.

    Their rank grows from round to round, up to that of the weight itself.

    Examples
    --------
    >>> once = joined_factors("w", {}, torch.ones(2, 1), torch.ones(1, 2))
    >>> twice = joined_factors("w", joined_factors("w", once, torch.ones(2, 1), torch.ones(1, 2)), once["w/folded_B"],
    ...     once["w/folded_A"])
    >>> bool((with_folded({}, {"w": torch.zeros(2, 2), **twice}, ["w"])["w"] - 3).abs().max() < 1e-5)
    True
    """
    if f"{weight}{_B}" in memory:
        b, a = torch.cat([memory[f"{weight}{_B}"], b], 1), torch.cat([memory[f"{weight}{_A}"], a])
    most = min(len(b), a.shape[1])
    if len(a) > most:
        b, a = best_of_rank([Term(b, a)], most)
    return {f"{weight}{_B}": b.contiguous(), f"{weight}{_A}": a.contiguous()}


def moved_weights(memory: State) -> dict[str, Tensor]:
    """The part of a method's memory that holds such factors."""
    return {name: tensor for name, tensor in memory.items() if name.endswith((_A, _B))}


def with_folded(state: State, usual: State, known: Iterable[str]) -> dict[str, Tensor]:
    """`state` with frozen weights: as they usually are, plus what came for them.

    Parameters
    ----------
    state
        What came; factors are taken out of it.
    usual
        Frozen weights as all make them; may hold factors too.
    known
        Names of the frozen ones.
    """
    came = {**usual, **state}
    whole = {name: tensor for name, tensor in state.items() if not name.endswith((_A, _B))}
    for name in known:
        b, a = came.get(f"{name}{_B}"), came.get(f"{name}{_A}")
        whole[name] = usual[name] if b is None or a is None else added(usual[name], b, a)
    return whole


def fresh_pair(pair: Pair, like: State, seed: int, *key: int) -> tuple[Tensor, Tensor]:
    """B and A as a new adapter has them: one factor drawn, the other zero, so that their product is zero.

    Raises
    ------
    AdapterError
        The tensors are no pair.
    """
    b, a = pair.factors(like)
    draw = torch_generator(seed, f"fresh pair {pair.a}", *key)
    if pair.kind == "embedding":
        return torch.randn(b.shape, generator=draw).to(b), torch.zeros_like(a)
    if not a.shape[1]:
        raise AdapterError(f"{pair.a!r} has no inputs")
    reach = a.shape[1] ** -0.5
    return torch.zeros_like(b), ((2 * torch.rand(a.shape, generator=draw) - 1) * reach).to(a)
