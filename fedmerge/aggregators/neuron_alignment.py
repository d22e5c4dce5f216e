"""Neuron alignment: each layer's neurons matched by the cross-correlation of what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmerge.aggregators.aligning import Permuting
from fedmerge.lookup.option_checks import check_count, check_range, check_word
from fedmerge.matching.activation_costs import match_activations
from fedmerge.matching.fairness import anchor_of, bounded
from fedmerge.matching.listening import Moments
from fedmerge.matching.symmetries import sampled_inputs
from fedmerge.permutations import PermutationSpec
from fedmerge.registry import register
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["NeuronAlignment"]


@register("neuron_alignment", paper="arXiv:2009.02439")
@dataclass(frozen=True)
class NeuronAlignment(Permuting):
    """Neurons matched by the cross-correlation of what they say after their nonlinearity; then the average.

    Tatro et al. 2020. With means m and standard deviations s over the server's data, neurons i and j cost
    ``1.01 - E[(x_i - m_i)(y_j - m_j)] / ((s_i + e)(s_j + e))``, and each layer is one assignment; no layer waits for
    another. ``rebasin(ground="activations")`` differs in e alone: there it is 0, so that a neuron that hardly ever
    changes correlates as much as any, and here such a pair counts little. The authors then train a curve between the
    two models, which needs labels, and refine the match by a proximal method; neither is here. They compare distances
    of what neurons say before their nonlinearity, here it is after it.

    Parameters
    ----------
    cost
        ``"correlation"``, or ``"distance"``: ``E[(x_i - y_j)^2]``, for which the scale of what neurons say matters.
    epsilon
        e, in units of activations, at least 0. It has no effect on distances.
    examples
        At most so many of the server's are listened to, evenly from all its batches; at least 1.

    Examples
    --------
    >>> import torch, fedmerge
    >>> a, b = (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)) for _ in range(2))
    >>> b.load_state_dict({"0.weight": a[0].weight.flip(0), "0.bias": a[0].bias.flip(0),
    ...                    "2.weight": a[2].weight.flip(1), "2.bias": a[2].bias})
    <All keys matched successfully>
    >>> merged = fedmerge.merge([a, b], "neuron_alignment", data=[torch.randn(50, 3)])
    >>> torch.equal(merged[0].weight, a[0].weight)
    True
    """

    requires_data: ClassVar[bool] = True

    cost: Literal["correlation", "distance"] = "correlation"
    epsilon: float = 1e-5
    examples: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word(self, "cost", ("correlation", "distance"))
        check_range(self, "epsilon", 0.0, float("inf"), open_high=True)
        check_count(self, "examples", 1)

    def permutations(
        self, spec: PermutationSpec, updates: Sequence[ClientUpdate], context: MergeContext
    ) -> list[list[Tensor]]:
        """Of every client, to the most typical one; of two, to the heavier."""
        states = [u.state for u in updates]
        trained = bounded([context.trained(state, "NeuronAlignment") for state in states])
        return match_activations(
            spec,
            [context.module(state, "NeuronAlignment") for state in states],
            trained,
            sampled_inputs(context, "NeuronAlignment", self.examples),
            anchor_of(trained, [u.weight for u in updates]),
            [u.client for u in updates],
            nearness if self.cost == "distance" else partial(cross_correlation, epsilon=self.epsilon),
        )


def cross_correlation(heard: Moments, epsilon: float) -> Tensor:
    """[n_a, n_b], of what neurons say; `epsilon` is added to each standard deviation."""
    sides = ((heard.sum_a, heard.squares_a), (heard.sum_b, heard.squares_b))
    a, b = ((q / heard.count - (s / heard.count).square()).clamp_min(0).sqrt() + epsilon for s, q in sides)
    return heard.covariance() / torch.outer(a, b).clamp_min(1e-300)


def nearness(heard: Moments) -> Tensor:
    """[n_a, n_b], 1 where neurons say the same and 0 where they are farthest apart."""
    distances = (heard.squares_a[:, None] + heard.squares_b - 2 * heard.products).clamp_min(0)
    return 1 - distances / distances.max().clamp_min(1e-300)
