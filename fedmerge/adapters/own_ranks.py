"""Clients with ranks and alphas of their own: what they train of the pairs that they are sent, and what they send."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmerge.adapters.inject import lora
from fedmerge.adapters.low_rank_pairs import factor_side, find_pairs
from fedmerge.adapters.scalings import pair_scaling, scaling_of
from fedmerge.errors import AdapterError, InvalidOption
from fedmerge.state import State, module_state

__all__ = ["Adapters", "OwnRanks"]


@dataclass(frozen=True)
class OwnRanks:
    """The ranks and alphas of clients: client i has the i-th, counted around.

    A client of rank r_i takes the first r_i slices of a pair that it is sent and trains them with its own scaling, B
    being rescaled, so that it starts from the very update, as far as its rank allows. In the model the other slices are
    zero: no gradient reaches them. They are not sent.

    Parameters
    ----------
    ranks, alphas
        At least one of each.
    rank_stabilized
        Whether updates are ``alpha / sqrt(r) * B A``.

    Examples
    --------
    >>> OwnRanks((4, 16), (8.0,)).of(3)
    (16, 8.0)
    """

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if not self.ranks or not self.alphas:
            raise InvalidOption("clients of unequal ranks need at least one rank and one alpha")
        for rank in self.ranks:
            pair_scaling(rank, 1.0)
        for alpha in self.alphas:
            pair_scaling(1, alpha)

    def of(self, client: int) -> tuple[int, float]:
        """Rank and alpha of a client."""
        return self.ranks[client % len(self.ranks)], self.alphas[client % len(self.alphas)]

    @property
    def largest(self) -> tuple[int, float]:
        """The largest rank, and the alpha of the first client that has it: what the server's model has."""
        clients = range(len(self.ranks) * len(self.alphas))
        return max((self.of(client) for client in clients), key=lambda own: own[0])

    @property
    def differ(self) -> bool:
        """Whether any client's rank or scaling is not the server's."""
        clients = range(len(self.ranks) * len(self.alphas))
        return any(self.of(client) != self.largest for client in clients)

    @torch.no_grad()
    def cut(self, model: nn.Module, client: int) -> None:
        """Have a model be the client's, in place.

        Raises
        ------
        AdapterError
            A layer does not tell the scaling of its pair, or its rank is below the client's.
        """
        (rank, alpha), state = self.of(client), module_state(model)[0]
        scaling = pair_scaling(rank, alpha, self.rank_stabilized)
        for pair in find_pairs(state):
            before = scaling_of(model, pair)
            if before is None or pair.rank(state) < rank:
                raise AdapterError(
                    f"client {client} is to train {pair.layer!r} at rank {rank}, and the model's pair there has rank "
                    f"{pair.rank(state)} and scaling {before}: make the model with the largest rank of all clients"
                )
            state[pair.b].mul_(before / scaling)
            state[pair.b][:, rank:] = 0
            state[pair.a][rank:] = 0
            mapping = model.get_submodule(pair.layer).scaling
            mapping[pair.adapter or next(iter(mapping))] = scaling  # type: ignore[operator, index, arg-type]

    def sent(self, states: State, client: int) -> dict[str, Tensor]:
        """Stacked tensors [1, ...] of a client, its pairs at its own rank."""
        rank, cut = self.of(client)[0], dict(states)
        for name in states:
            side = factor_side(name)
            if side:
                cut[name] = states[name][:, :rank] if side == "A" else states[name][:, :, :rank]
        return cut


@dataclass(frozen=True)
class Adapters:
    """Where a model gets adapters: the arguments of :func:`~fedmerge.adapters.lora`, small, for they travel to workers.

    Parameters
    ----------
    ranks, targets, train
        See there; the model has the largest rank.
    """

    ranks: OwnRanks
    targets: tuple[str, ...] = ("*",)
    train: tuple[str, ...] = ()

    def put_into(self, model: nn.Module, seed: int) -> nn.Module:
        """The model with adapters."""
        rank, alpha = self.ranks.largest
        stabilized = self.ranks.rank_stabilized
        return lora(model, rank, alpha, self.targets, train=self.train, rank_stabilized=stabilized, seed=seed)
