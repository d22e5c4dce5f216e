"""Git Re-Basin: neurons re-ordered so that models lie in one basin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedmerge.aggregators.aggregator import ServerData
from fedmerge.aggregators.aligning import Permuting
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.matching.activation_costs import match_activations
from fedmerge.matching.fairness import anchor_of, bounded
from fedmerge.matching.symmetries import sampled_inputs
from fedmerge.matching.weight_costs import match_many
from fedmerge.permutations import PermutationSpec
from fedmerge.registry import register
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Rebasin"]


@register("rebasin", paper="arXiv:2209.04836")
@dataclass(frozen=True)
class Rebasin(Permuting):
    """Neurons re-ordered to bring the models' weights, or activations, near each other; then the average.

    Ainsworth et al. 2023. On weights: coordinate ascent on ``sum_l <W_A[l], P[l] W_B[l] P[l-1]^T>`` over all
    groups of neurons (algorithm 1), many models by matching each to the weighted mean of the others
    (algorithm 3). On activations: correlation of what neurons say on the server's data, layer by layer, to the
    client that looks most like all others. Models that started together stay as they are, and FedAvg is the result.

    Parameters
    ----------
    ground
        ``"weights"``, or ``"activations"``, which needs data on the server.
    sweeps
        At most so many rounds over all clients, at least 1.
    restarts
        Trials of the first match on weights, in other orders of visits, the best of which is taken; at least 1.
    examples
        At most so many of the server's are listened to, evenly from all its batches; at least 1.

    Examples
    --------
    >>> import torch, fedmerge
    >>> a = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> b = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    >>> b.load_state_dict({"0.weight": a[0].weight[order], "0.bias": a[0].bias[order],
    ...                    "2.weight": a[2].weight[:, order], "2.bias": a[2].bias})
    <All keys matched successfully>
    >>> merged = fedmerge.merge([a, b], "rebasin", example=torch.randn(2, 3))
    >>> torch.equal(merged[0].weight, a[0].weight)
    True
    """

    ground: Literal["weights", "activations"] = "weights"
    sweeps: int = 10
    restarts: int = 1
    examples: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "examples", 1, float("inf"), open_high=True)
        check_range(self, "sweeps", 1, float("inf"), open_high=True)
        check_range(self, "restarts", 1, float("inf"), open_high=True)
        if self.ground not in ("weights", "activations"):
            raise InvalidOption(f'Rebasin: ground must be "weights" or "activations", got {self.ground!r}')

    @property
    def server_data(self) -> ServerData:
        """Inputs, to hear activations on."""
        own = super().server_data
        return "inputs" if self.ground == "activations" and own == "none" else own

    def permutations(
        self, spec: PermutationSpec, updates: Sequence[ClientUpdate], context: MergeContext
    ) -> list[list[Tensor]]:
        """To the mean of the others, or to the heaviest client."""
        states, weights = [u.state for u in updates], [u.weight for u in updates]
        generator = context.torch_generator("rebasin")
        trained = bounded([context.trained(state, "Rebasin") for state in states])
        if self.ground == "weights":
            return match_many(spec, trained, weights, rounds=self.sweeps, restarts=self.restarts, generator=generator)
        modules = [context.module(state, "Rebasin") for state in states]
        inputs, anchor = sampled_inputs(context, "Rebasin", self.examples), anchor_of(trained, weights)
        return match_activations(spec, modules, trained, inputs, anchor, [u.client for u in updates])
