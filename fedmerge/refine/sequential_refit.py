"""Layer by layer under the merged prefix: weights that give, from merged inputs, the clients' own pre-activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.lookup.option_checks import check_range
from fedmerge.refine.refinement import Proposal, Refinement, Step, Sums
from fedmerge.registry import register
from fedmerge.state import State, prefixed, with_prefix
from fedmerge.statistics import RefitSums, Statistic
from fedmerge.statistics.measuring.weight_matrices import WeightMatrix

__all__ = ["SequentialRefit", "refitted"]


@register("sequential_refit", paper="docs/beyond.md")
@dataclass(frozen=True)
class SequentialRefit(Refinement):
    """Every layer in turn by ridge regression of the clients' own pre-activations on the merged model's inputs.

    For each layer, from the first on, clients send second moments of the inputs h that the merged model, refitted so
    far, gives it, and the pre-activations z of the model that they trained themselves against them:
    ``W = (sum z h^T + l W_0) (sum h h^T + l I)^-1``, a pull towards the merged W_0. No labels are in it. One exchange a
    layer. Layers are taken in the order in which the model names them. The whole is judged once, after the last
    layer, for a refitted layer fits no layer behind it that is not: all of it, half of the way, or none. RegMean++
    (arXiv 2508.03121) has the merged prefix too, with W_i applied to merged inputs for z.

    Parameters
    ----------
    ridge
        l, in units of the mean diagonal of the moments, above 0.
    head
        Whether the last layer is refitted too. A head that is fitted to labels does better.
    examples
        At most so many of each client are measured; all where not given.
    """

    ridge: float = 1e-3
    head: bool = False
    examples: int | None = None

    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(self, "ridge", 1e-12, float("inf"), open_high=True)

    def steps(self, state: State) -> tuple[Step, ...]:
        """One for every weight matrix, but the last."""
        weights = self.weights(state)
        return tuple(RefitStep(name, name == weights[-1], self.ridge, self.examples) for name in weights)

    def weights(self, state: State) -> list[str]:
        """Names of the weights that are refitted, in order."""
        names = [name for name, tensor in state.items() if "weight" in name and tensor.ndim > 1]
        return names if self.head else names[:-1]

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Sums at every layer."""
        return (RefitSums(examples=self.examples),)


@dataclass(frozen=True)
class RefitStep(Step):
    """One layer; the last of them lets clients choose."""

    measured: ClassVar[str] = "refit_sums"
    """Which statistic it is made of."""

    weight: str
    last: bool
    ridge: float
    examples: int | None

    def needs(self) -> tuple[Statistic, ...]:
        """Sums at this layer."""
        return (RefitSums(layers=(self.weight,), examples=self.examples),)

    def propose(self, state: State, sums: Sums, memory: State) -> tuple[Proposal | None, State]:
        """The refitted layer; of the last one, also the way back to where the first began, which is the memory."""
        measured = sums[self.measured]
        before = prefixed("refit", memory)
        step: dict[str, Tensor] = {}
        if measured:  # nothing where the layer is of a kind that no matrix describes
            moments, products = measured[f"{self.weight}.S"], measured[f"{self.weight}.Z"]
            matrix = WeightMatrix.measured_by(self.weight, moments, state)
            present = matrix.gather(state).double()
            step = matrix.scatter(refitted(moments, products, present, self.ridge) - present)
            before = {**before, **{name: state[name].clone() for name in matrix.names}}
        if not self.last:
            # Judged now, it would be declined for what is still to come.
            return Proposal((step,), ((1.0,),), 0), with_prefix("refit", before)
        back = {name: tensor.double() - state[name].double() for name, tensor in before.items()}
        return Proposal((step, back), ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)), 2), {}


def refitted(moments: Tensor, products: Tensor, present: Tensor, ridge: float) -> Tensor:
    """``(Z + l W_0) (S + l I)^-1`` with ``l = ridge tr(S) / d``, group by group.

    Parameters
    ----------
    moments
        S, [d, d] or [groups, d, d].
    products
        Z, [out, d] or [groups, out / groups, d].
    present
        W_0, [groups, out / groups, d].
    ridge
        In units of the mean of the diagonal.

    Examples
    --------
    >>> refitted(torch.eye(2), torch.ones(1, 2), torch.zeros(1, 1, 2), 1.0)
    tensor([[[0.5000, 0.5000]]])
    """
    size = moments.shape[-1]
    s, z = moments.reshape(-1, size, size), products.reshape(len(present), -1, size)
    pull = ridge * s.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-300)
    damped = s + pull * torch.eye(size, dtype=s.dtype, device=s.device)
    solved: Tensor = torch.linalg.solve(damped, (z + pull * present).transpose(1, 2))
    return solved.transpose(1, 2)
