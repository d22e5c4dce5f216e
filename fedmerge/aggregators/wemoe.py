"""WEMoE: layers whose task vectors are mixed by what they see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedmerge.aggregators.routed import (
    Routed,
    chosen_modules,
    differences,
    server_batches,
    trained_names,
    widths_seen,
    within,
)
from fedmerge.aggregators.searched import shares
from fedmerge.lookup.option_checks import check_count, check_range, check_word
from fedmerge.registry import register
from fedmerge.routing import Gate, RoutedModel, Routing
from fedmerge.routing.gate_fitting import fit_gates, objective
from fedmerge.state import State, cast_like, from_pairs
from fedmerge.tasks.reading import called_as_told
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["WeMoe"]


@register("wemoe", paper="arXiv:2402.00433")
@dataclass(frozen=True)
class WeMoe(Routed):
    """Chosen layers whose task vectors a gate mixes by the layer's own input; all else is task arithmetic.

    Tang et al. 2024, section 3: a chosen layer has the parameters ``theta_0 + sum_i r_i(h) tau_i``, h being its input,
    averaged over tokens, and r a network with one hidden layer of ReLUs, no softmax behind it. Its last layer begins at
    zero and its bias at the factors of task arithmetic, so that the untrained model is the shared one. Adam then
    minimises the entropy of predictions on the server's inputs. The authors route the MLPs of transformers
    (``layers="*.mlp"``), average h over the batch, which makes predictions depend on the other inputs of a batch (here
    each example has its own), and take 1000 steps of 1e-4.

    Parameters
    ----------
    layers
        Patterns of the modules to route, divided by spaces; all linear layers where empty.
    depth
        Layers of a gate: 2, 1, or 0 for numbers that depend on no input, as AdaMerging's.
    objective
        ``"entropy"`` of predictions, which falls by confident collapse where labels are skewed; or ``"loss"``, which
        needs labels.
    steps, learning_rate
        Of Adam; a step is one batch of the server's data. Without steps it is task arithmetic.
    scale
        See :class:`~fedmerge.aggregators.routed.Routed`; 0.3 in the paper.

    Examples
    --------
    >>> import fedmerge
    >>> from torch import nn
    >>> base, first, second = (nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3))
    >>> routed = fedmerge.merge([first, second], "wemoe", base=base, data=torch.randn(8, 2), steps=2)
    >>> routed(torch.randn(5, 2)).shape
    torch.Size([5, 2])
    """

    layers: str = ""
    depth: int = 2
    objective: Literal["entropy", "loss"] = "entropy"
    steps: int = 100
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "depth", 0)
        check_range(self, "depth", 0, 2)
        check_word(self, "objective", ("entropy", "loss"))
        check_count(self, "steps", 0)
        check_range(self, "learning_rate", 0.0, float("inf"), open_low=True, open_high=True)

    def route(self, shared: State, updates: Sequence[ClientUpdate], context: MergeContext) -> Routing:
        """Gates at the chosen layers, trained on the server's data."""
        batches = server_batches(context, "WeMoe", labelled=self.objective == "loss")
        module, base = self.module(shared, context), context.required_base("wemoe")
        trained = trained_names(updates, context)
        names = chosen_modules(module, self.layers, trained)
        widths = widths_seen(called_as_told(module, context.task, batches[0][0]), names, batches[0][0])
        start, generator = self.starts(shares(updates).tolist()), context.torch_generator("wemoe gates")
        gates = {name: self._gate(name, width, start, generator) for name, width in widths.items()}
        routed = within(trained, gates)
        experts = differences(updates, base, routed, shared)
        origin = cast_like(from_pairs({name: base[name] for name in routed}, shared), shared)
        none = None if self.depth else torch.zeros(0)
        routing = Routing(gates, experts, tuple(u.client for u in updates), origin, none)
        return fit_gates(
            RoutedModel(module, routing),
            batches,
            lambda there: objective(self.objective, there, context.task, "WeMoe"),
            steps=self.steps,
            learning_rate=self.learning_rate,
            task=context.task,
        )

    def _gate(self, name: str, width: int, start: torch.Tensor, generator: torch.Generator) -> Gate:
        if not self.depth:
            return Gate.fresh(0, start, None, generator=generator)
        return Gate.fresh(width, start, name, hidden=width if self.depth == 2 else 0, generator=generator)
