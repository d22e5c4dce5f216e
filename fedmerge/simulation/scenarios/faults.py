"""Faults of simulated clients: who crashes, sends nonsense, disappears or is late, in which round."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from fedmerge.errors import InjectedFault, InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.seeding import generator
from fedmerge.state import State

__all__ = ["FaultKind", "Faults", "Mishaps", "no_reply"]

FaultKind = Literal["crash", "nan", "garbage", "drop", "slow"]


@dataclass(frozen=True)
class Faults:
    """Probabilities that a client which is to train has a fault in that round; it has one at most, so they add up.

    Parameters
    ----------
    crash
        It raises before it trains.
    nan
        One entry of one tensor of its update is NaN.
    garbage
        A tensor of its update is missing, or has another shape.
    drop
        It never replies.
    slow
        Its reply comes `slow_seconds` late. Nobody sleeps: the lateness is held against ``round_timeout``, and where it
        is as long or longer, the reply does not count; without a ``round_timeout`` it is waited for.
    slow_seconds
        That lateness in simulated seconds.

    Raises
    ------
    InvalidOption
        Something outside [0, 1], more than 1 in sum, or a lateness below zero.

    Examples
    --------
    >>> Faults(crash=0.1, nan=0.05).total
    0.15
    """

    crash: float = 0.0
    nan: float = 0.0
    garbage: float = 0.0
    drop: float = 0.0
    slow: float = 0.0
    slow_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in get_args(FaultKind):
            check_range(self, name, 0.0, 1.0)
        check_range(self, "slow_seconds", 0.0, math.inf, open_high=True)
        if self.total > 1:
            raise InvalidOption(f"faults are {self.total:g} in sum, at most 1 is possible: a client has one of them")

    @property
    def total(self) -> float:
        """Probability of any fault."""
        return round(sum(share for _, share in self.shares()), 12)

    def shares(self) -> Iterator[tuple[FaultKind, float]]:
        """Kinds and their probabilities."""
        for name in get_args(FaultKind):
            yield name, getattr(self, name)


@dataclass(frozen=True)
class Mishaps:
    """The faults of one run: the same in every setting and order, for each is drawn from seed, client and round.

    Parameters
    ----------
    faults
        How often.
    seed
        Root of the draws.
    """

    faults: Faults
    seed: int

    def fault(self, client: int, round: int) -> FaultKind | None:
        """What befalls a client in a round, if anything.

        Examples
        --------
        >>> mishaps = Mishaps(Faults(crash=0.5), seed=0)
        >>> [mishaps.fault(client, round=1) for client in range(4)] == [mishaps.fault(c, 1) for c in range(4)]
        True
        """
        return self._drawn(client, round)[0]

    def begin(self, client: int, round: int) -> None:
        """Called before a client trains.

        Raises
        ------
        InjectedFault
            It crashes.
        """
        if self.fault(client, round) == "crash":
            raise InjectedFault(f"it crashed in round {round}, as faults.crash has it")

    def sends_well(self, client: int, round: int) -> bool:
        """Whether its update goes out as it is."""
        return self.fault(client, round) not in ("nan", "garbage")

    def sent(self, state: State, client: int, round: int) -> State:
        """The tensors that a client sends instead of `state`, which stays as it is."""
        kind, draw = self._drawn(client, round)
        if kind == "nan":
            return _with_nan(state, draw)
        return _garbled(state, draw) if kind == "garbage" else state

    def lost(self, client: int, round: int, timeout: float | None) -> str | None:
        """Why the server gets no reply in time, if so."""
        kind = self.fault(client, round)
        if kind == "drop":
            return no_reply(client, timeout)
        if kind == "slow" and timeout is not None and self.faults.slow_seconds >= timeout:
            return f"client {client}: late: {self.faults.slow_seconds:g} s, the round ended at {timeout:g} s"
        return None

    def _drawn(self, client: int, round: int) -> tuple[FaultKind | None, np.random.Generator]:
        draw = generator(self.seed, "faults", client, round)
        left = draw.random()
        for kind, share in self.faults.shares():
            if left < share:
                return kind, draw
            left -= share
        return None, draw


def no_reply(client: int, timeout: float | None) -> str:
    """The reason in the record of a client that is not heard of.

    Examples
    --------
    >>> no_reply(3, 30.0)
    'client 3: no reply within 30 s'
    """
    return f"client {client}: no reply" + ("" if timeout is None else f" within {timeout:g} s")


def _with_nan(state: State, draw: np.random.Generator) -> State:
    names = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()]
    if not names:
        return state
    name = names[draw.integers(len(names))]
    # One entry of all: what is hardest to find.
    broken = state[name].clone()
    broken.view(-1)[draw.integers(broken.numel())] = math.nan
    return {**state, name: broken}


def _garbled(state: State, draw: np.random.Generator) -> State:
    name = list(state)[draw.integers(len(state))]
    if draw.random() < 0.5:
        return {other: tensor for other, tensor in state.items() if other != name}
    # A row too many; a number becomes a row.
    tensor = state[name] if state[name].ndim else state[name][None]
    return {**state, name: torch.cat([tensor, tensor[:1] if len(tensor) else tensor.new_zeros(1, *tensor.shape[1:])])}
