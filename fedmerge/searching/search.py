"""Coefficients, the models that they stand for, and how a search asks what these are worth."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.state import State
from fedmerge.statistics import Statistic

__all__ = ["Judged", "PointSearch", "Problem", "Search", "Span", "Trial", "by_tensor", "task_vectors"]


@dataclass(frozen=True)
class Span:
    """Models ``origin + sum_j x_j direction_j``, by their coefficients x.

    Parameters
    ----------
    origin
        Where all coefficients are 0.
    directions
        What coefficients multiply; each may be about some of the names.
    start
        [m], the coefficients at which a search begins, float64.

    Examples
    --------
    >>> span = Span({"w": torch.ones(1)}, ({"w": torch.ones(1)},), torch.tensor([0.5]))
    >>> span.state(span.start)["w"]
    tensor([1.5000], dtype=torch.float64)
    """

    origin: State
    directions: tuple[State, ...]
    start: Tensor

    def state(self, coefficients: Tensor) -> dict[str, Tensor]:
        """The model with these coefficients [m], in float64."""
        state = {name: tensor.double() for name, tensor in self.origin.items()}
        for factor, direction in zip(coefficients.tolist(), self.directions, strict=True):
            for name, step in direction.items():
                if factor:
                    state[name] = state[name] + factor * step.double()
        return state


@dataclass(frozen=True)
class Problem:
    """What a search is told.

    Parameters
    ----------
    start
        [m], where it begins: the first point that it tries.
    seed
        Of whatever it draws.
    models
        How many models were merged.
    labelled
        Whether those who judge know targets.
    span
        The models among which is searched.
    """

    start: Tensor
    seed: int
    models: int = 1
    labelled: bool = True
    span: Span | None = None


@dataclass(frozen=True)
class Trial:
    """Coefficients that a search wants judged.

    Parameters
    ----------
    points
        [n, m], float64.
    slopes
        What measures the objective and its slopes at the one point there is; None where only losses are wanted.
    penalties
        [n], added to what the judges find; none where not given.
    state
        Parameters of the one model to be measured, where no coefficients stand for it; `slopes` is then a gradient.
    """

    points: Tensor
    slopes: Statistic | None = None
    penalties: Tensor | None = None
    state: State | None = None


@dataclass(frozen=True)
class Judged:
    """What was found of a trial: `values` [n], less is better, and `slopes` [m] or the gradient where asked for."""

    values: Tensor
    slopes: Tensor | None = None
    gradient: State | None = None


PointSearch = Generator[Trial, Judged, None]
"""A search among points alone: whoever runs it keeps the best one."""

Search = Generator[Trial, Judged, State | None]
"""Yields what it wants to know and is sent what was found; whoever runs it keeps the best point, or takes the
parameters that it returns."""


def task_vectors(states: Sequence[State], base: State) -> tuple[State, ...]:
    """``tau_i = theta_i - theta_0``, float64.

    Examples
    --------
    >>> task_vectors([{"w": torch.ones(1)}], {"w": torch.zeros(1)})
    ({'w': tensor([1.], dtype=torch.float64)},)
    """
    return tuple({name: tensor.double() - base[name].double() for name, tensor in state.items()} for state in states)


def by_tensor(vectors: Sequence[State], start: Tensor) -> tuple[tuple[State, ...], Tensor]:
    """Directions for a coefficient per vector and tensor, and where they start: each as its vector does.

    Parameters
    ----------
    vectors
        With the same names.
    start
        One number per vector.

    Examples
    --------
    >>> one = torch.ones(1)
    >>> directions, start = by_tensor([{"a": one, "b": one}], torch.tensor([0.3]))
    >>> [list(direction) for direction in directions], len(start)
    ([['a'], ['b']], 2)
    """
    directions = tuple({name: tensor} for vector in vectors for name, tensor in vector.items())
    starts = [start[i : i + 1].expand(len(vector)) for i, vector in enumerate(vectors)]
    return directions, torch.cat(starts) if starts else start[:0]
