"""Proof by trial: re-order all neurons at random and compare outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import ModelError
from fedmerge.permutations.running import undisturbed
from fedmerge.permutations.spec import PermutationSpec
from fedmerge.permutations.trial import Trial, trial
from fedmerge.seeding import torch_generator
from fedmerge.state import State

__all__ = ["Comparison", "verify"]

_TRIALS = 3
_ROUNDING = 64.0  # times the outputs move as much where neurons are re-ordered as where weights are off by an ulp


def verify(spec: PermutationSpec, model: nn.Module, example: Any, *, tolerance: float = 1e-5, seed: int = 0) -> float:
    """Apply random permutations of every group and compare the model's outputs, in eval mode.

    In float64; where the model fixes a precision itself, in float32 or else in its own. Norm statistics and all
    vectors (biases, scales) are drawn at random first, as fresh ones are alike, which hides mistakes, and small
    weights are made larger, so that what they do can be seen at the outputs. What the model draws is the same
    in every run.

    Parameters
    ----------
    spec
        What is to be proved.
    model
        It is not modified.
    example
        What the model is called with, of any form that :func:`~fedmerge.permutations.trace` takes.
    tolerance
        Largest difference that is no contradiction. Rounding is none either: a difference as large as one in the last
        digits of the weights makes does not count.
    seed
        Of permutations and of what is drawn.

    Returns
    -------
    float
        Largest difference of outputs, relative to how much the values of an output differ from example to example.

    Raises
    ------
    ModelError
        It is above the tolerance, and the message names the groups that are to blame; or the model does not run.

    Examples
    --------
    >>> from fedmerge.permutations import trace
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> verify(trace(model, torch.zeros(2, 4)), model, torch.zeros(2, 4)) < 1e-5
    True
    """
    generator = torch_generator(seed, "verify")
    with undisturbed():
        comparison = Comparison(trial(model, example, spec.aliases, generator), generator)

        def error(perms: list[Tensor]) -> float:
            return comparison.error(spec.apply(comparison.trial.state, perms), tolerance)

        # More than once, as one order of a few neurons may be right by chance where others are not.
        worst = max(error([_moving(group.size, generator) for group in spec.groups]) for _ in range(_TRIALS))
        if worst <= tolerance:
            return worst
        culprits = []
        for i, group in enumerate(spec.groups):
            alone = [[*spec.identity()] for _ in range(_TRIALS)]
            for perms in alone:
                perms[i] = _moving(group.size, generator)
            if any(error(perms) > tolerance for perms in alone):
                culprits.append(f"{group.name!r} ({', '.join(f'{s.parameter} axis {s.axis}' for s in group.sites)})")
    raise ModelError(
        f"re-ordering neurons changes the outputs of {type(model).__name__} by {worst:.1g} of their size: "
        f"wrong are {'; '.join(culprits) or 'only several groups together'}. Remove them from the spec"
    )


class Comparison:
    """Outputs against those of a trial's state."""

    def __init__(self, tried: Trial, generator: torch.Generator) -> None:
        self.trial, self._generator = tried, generator
        self._wanted = tried.outputs(tried.state)
        if not self._wanted:
            raise ModelError(
                f"the outputs of {type(tried.module).__name__} hold no tensor: there is nothing to compare"
            )
        self._scales = [_spread(output) or 1.0 for output in self._wanted]
        self._rounding: list[float] | None = None

    def error(self, state: State, tolerance: float) -> float:
        """Largest relative difference; beyond what rounding makes, where it is above the tolerance."""
        apart = self._apart(state)
        worst = max(d / s for d, s in zip(apart, self._scales, strict=True))
        if worst <= tolerance:
            return worst
        if self._rounding is None:
            eps = max((torch.finfo(t.dtype).eps for t in state.values() if t.is_floating_point()), default=0.0)
            often = min(_ROUNDING, eps**-0.5)  # more of a coarse type would be all there is
            self._rounding = [often * d for d in map(max, *(self._apart(self._off()) for _ in range(3)))]
        return max(max(d - r, 0.0) / s for d, r, s in zip(apart, self._rounding, self._scales, strict=True))

    def _apart(self, state: State) -> list[float]:
        """Largest difference of each output."""
        return [_difference(a, b) for a, b in zip(self._wanted, self.trial.outputs(state), strict=True)]

    def _off(self) -> dict[str, Tensor]:
        """The trial's state with an error in the last digit of each entry."""

        def off(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            sign = torch.rand(tensor.shape, generator=self._generator, dtype=torch.float64).round() * 2 - 1
            return tensor * (1 + torch.finfo(tensor.dtype).eps * sign).to(tensor.dtype)

        return {name: off(tensor) for name, tensor in self.trial.state.items()}


def _moving(size: int, generator: torch.Generator) -> Tensor:
    """A random permutation that is not the identity."""
    perm = torch.randperm(size, generator=generator)
    return perm.roll(1) if torch.equal(perm, torch.arange(size)) else perm


def _spread(output: Tensor) -> float:
    """How much outputs differ from each other: a bias that all share would hide what moves."""
    output = output.where(output.isfinite(), 0.0)
    deviation = output - (output.mean(0) if output.ndim > 1 and len(output) > 1 else output.mean())
    return float(deviation.abs().max()) or float(output.abs().max())


def _difference(first: Tensor, other: Tensor) -> float:
    """Largest difference of entries; infinities that are equal do not differ."""
    if first.shape != other.shape:
        return float("inf")
    apart = torch.where(first == other, 0.0, (first - other).abs())
    return float(apart.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
