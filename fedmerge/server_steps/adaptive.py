"""Adam, Yogi and Adagrad on the server: steps whose size each parameter's past decides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmerge.lookup.option_checks import check_form, check_range
from fedmerge.registry import register
from fedmerge.server_steps.server_step import ServerStep
from fedmerge.state import State, accumulator_dtype, as_pairs, from_pairs, prefixed, with_prefix

__all__ = ["ServerAdagrad", "ServerAdam", "ServerYogi"]


@register("server_adam", paper="arXiv:2003.00295", alone="fedadam")
@dataclass(frozen=True)
class ServerAdam(ServerStep):
    """Adam on the server (FedAdam).

    Reddi et al. 2021, algorithm 2: with ``delta = merged - base``, ``m <- beta1 m + (1 - beta1) delta``,
    ``v <- beta2 v + (1 - beta2) delta^2`` from ``m = 0``, ``v = tau^2``, and
    ``theta+ = base + learning_rate * m / (sqrt(v) + tau)``; no bias correction, as in the paper. Real and imaginary
    parts have moments of their own, as in torch.

    Parameters
    ----------
    learning_rate
        Server learning rate eta, in units of parameters per normalised step.
    beta1, beta2
        Decay of the first and second moment, in [0, 1).
    tau
        Degree of adaptivity: the smaller, the more every parameter moves alike.
    form
        ``"paper"`` as above. ``"flower"`` as Flower's FedAdam: ``v = 0`` at first, and in step t, from 1, the learning
        rate times ``sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1))``.
    """

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    form: Literal["paper", "flower"] = "paper"

    def __post_init__(self) -> None:
        _check(self, "beta1", "beta2")
        check_form(self, self.form)

    def step(self, base: State, merged: State, memory: State) -> tuple[State, State]:
        """Take the adaptive step; the memory holds both moments, and in Flower's form the number of steps."""
        if self.form == "paper":
            return _adapted(self, base, merged, memory, self.learning_rate)
        done = memory.get("t", torch.tensor(0)) + 1
        power = int(done) + 1
        rate = self.learning_rate * math.sqrt(1 - self.beta2**power) / (1 - self.beta1**power)
        state, moments = _adapted(self, base, merged, memory, rate)
        return state, {**moments, "t": done}

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """A decaying mean of squares."""
        return self.beta2 * v + (1 - self.beta2) * square


@register("server_yogi", paper="arXiv:2003.00295", alone="fedyogi")
@dataclass(frozen=True)
class ServerYogi(ServerStep):
    """Yogi on the server (FedYogi): as Adam, but large steps of the past are forgotten slowly.

    Reddi et al. 2021, algorithm 2: as :class:`ServerAdam`, with
    ``v <- v - (1 - beta2) delta^2 sign(v - delta^2)``.

    Parameters
    ----------
    learning_rate, beta1, beta2, tau
        As for :class:`ServerAdam`.
    form
        Where v begins: ``"paper"`` at tau^2, ``"flower"`` at 0, as in Flower's FedYogi.
    """

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    form: Literal["paper", "flower"] = "paper"

    def __post_init__(self) -> None:
        _check(self, "beta1", "beta2")
        check_form(self, self.form)

    def step(self, base: State, merged: State, memory: State) -> tuple[State, State]:
        """Take the adaptive step; the memory holds both moments."""
        return _adapted(self, base, merged, memory, self.learning_rate)

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Towards the new square, by a part of that square at most."""
        return v - (1 - self.beta2) * square * (v - square).sign()


@register("server_adagrad", paper="arXiv:2003.00295", alone="fedadagrad")
@dataclass(frozen=True)
class ServerAdagrad(ServerStep):
    """Adagrad on the server (FedAdagrad): steps shrink with all that a parameter has moved.

    Reddi et al. 2021, algorithm 2: as :class:`ServerAdam`, with ``v <- v + delta^2``.

    Parameters
    ----------
    learning_rate, beta1, tau
        As for :class:`ServerAdam`.
    form
        Where v begins: ``"paper"`` at tau^2, ``"flower"`` at 0, as in Flower's FedAdagrad.
    """

    learning_rate: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3
    form: Literal["paper", "flower"] = "paper"

    def __post_init__(self) -> None:
        _check(self, "beta1")
        check_form(self, self.form)

    def step(self, base: State, merged: State, memory: State) -> tuple[State, State]:
        """Take the adaptive step; the memory holds both moments."""
        return _adapted(self, base, merged, memory, self.learning_rate)

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The sum of all squares."""
        return v + square


_Adaptive = ServerAdam | ServerYogi | ServerAdagrad


def _check(step: _Adaptive, *betas: str) -> None:
    check_range(step, "learning_rate", 0.0, math.inf, open_high=True)
    for beta in betas:
        check_range(step, beta, 0.0, 1.0, open_high=True)
    check_range(step, "tau", 1e-12, math.inf, open_high=True)


def _adapted(
    step: _Adaptive, base: State, merged: State, memory: State, rate: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The step that the three share: they differ in how ``step.second`` counts squares."""
    first, second = prefixed("m", memory), prefixed("v", memory)
    start_at = step.tau**2 if step.form == "paper" else 0.0
    state, m, v = {}, {}, {}
    previous, base, merged = base, as_pairs(base), as_pairs(merged)
    for name, start in base.items():
        delta = merged[name].to(accumulator_dtype(start.dtype)) - start
        m[name] = (1 - step.beta1) * delta + step.beta1 * first.get(name, torch.zeros_like(delta))
        v[name] = step.second(second.get(name, torch.full_like(delta, start_at)), delta.square())
        state[name] = start + rate * m[name] / (v[name].sqrt() + step.tau)
    return from_pairs(state, previous), {**with_prefix("m", m), **with_prefix("v", v)}
