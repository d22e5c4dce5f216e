"""PWE-MoE: one model for every preference among the clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedmerge.aggregators.routed import (
    Routed,
    chosen_modules,
    differences,
    owners,
    server_batches,
    trained_names,
    widths_seen,
    within,
)
from fedmerge.aggregators.searched import shares
from fedmerge.lookup.option_checks import check_count, check_range
from fedmerge.registry import register
from fedmerge.routing import Gate, RoutedModel, Routing
from fedmerge.routing.gate_fitting import Objective, fit_gates
from fedmerge.state import State, cast_like, from_pairs
from fedmerge.tasks import as_batch, reading_of
from fedmerge.tasks.reading import called_as_told
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["PweMoe"]


@register("pwe_moe", paper="arXiv:2406.09770")
@dataclass(frozen=True)
class PweMoe(Routed):
    """A preference among the clients in, a plain model out: gates mix task vectors by it, layer by layer.

    Tang et al. 2024, linear scalarisation: a chosen layer has ``theta_0 + sum_i g_i(r) tau_i``, g a network with one
    hidden layer of ReLUs that sees the preference r alone, positive and adding up to 1. Each step draws r from a flat
    Dirichlet distribution and goes against the gradient of ``sum_i r_i L_i``. Its last layer begins at zero and its
    bias at the factors of task arithmetic. L_i is the loss on client i's task; here that is the mean over those of the
    server's labelled examples that client i's own model serves best, see :func:`~fedmerge.aggregators.routed.owners`.

    Each client is judged with, and is sent, the model for itself alone (``r_i = 1``). What is tested is that for the
    clients' shares of the examples. :meth:`~fedmerge.routing.RoutedModel.of_preference` makes any other. The authors
    take 2000 steps of 1e-2, or 8000 of 1e-5.

    Parameters
    ----------
    layers
        Patterns of the modules to mix, divided by spaces; all linear layers where empty.
    hidden
        Width of the gates' hidden layer, at least 1.
    steps, learning_rate
        Of Adam; a step is one batch of the server's data. Without steps it is task arithmetic for every preference.
    scale
        See :class:`~fedmerge.aggregators.routed.Routed`; 0.3 in the paper.

    Examples
    --------
    >>> import fedmerge
    >>> from torch import nn
    >>> base, first, second = (nn.Linear(2, 2) for _ in range(3))
    >>> net, batch = nn.Sequential, (torch.randn(8, 2), torch.arange(8) % 2)
    >>> merged = fedmerge.merge([net(first), net(second)], "pwe_moe", base=net(base), data=[batch], steps=2)
    >>> merged.of_preference([0.2, 0.8])
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
    )
    """

    layers: str = ""
    hidden: int = 16
    steps: int = 200
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "hidden", 1)
        check_count(self, "steps", 0)
        check_range(self, "learning_rate", 0.0, float("inf"), open_low=True, open_high=True)

    def route(self, shared: State, updates: Sequence[ClientUpdate], context: MergeContext) -> Routing:
        """Gates at the chosen layers, trained on preferences drawn at random."""
        batches = server_batches(context, "PweMoe", labelled=True)
        module, base = self.module(shared, context), context.required_base("pwe_moe")
        trained = trained_names(updates, context)
        chosen = chosen_modules(module, self.layers, trained)
        called = widths_seen(called_as_told(module, context.task, batches[0][0]), chosen, batches[0][0])
        share, generator = shares(updates), context.torch_generator("pwe_moe gates")
        start = self.starts(share.tolist())
        gates = {
            name: Gate.fresh(len(updates), start, None, hidden=self.hidden, generator=generator) for name in called
        }
        routed = within(trained, gates)
        clients, each = tuple(update.client for update in updates), torch.eye(len(updates))
        own = {client: each[place].clone() for place, client in enumerate(clients)}
        experts = differences(updates, base, routed, shared)
        origin = cast_like(from_pairs({name: base[name] for name in routed}, shared), shared)
        routing = Routing(gates, experts, clients, origin, share.float(), own)
        whose = owners(module, shared, updates, batches, context.task)
        fitted = fit_gates(
            RoutedModel(module, routing),
            batches,
            self._scalarised(whose, len(updates), context),
            steps=self.steps,
            learning_rate=self.learning_rate,
            task=context.task,
        )
        return replace(fitted, preference=share.float(), own=own)

    def _scalarised(
        self, whose: Sequence[Tensor], clients: int, context: MergeContext
    ) -> Callable[[Sequence[tuple[Any, Tensor]]], Objective]:
        """``sum_i r_i L_i`` of a batch, at an r drawn for it."""
        reading, generator = reading_of(context.task), context.torch_generator("pwe_moe preferences")

        def of(batches: Sequence[tuple[Any, Tensor]]) -> Objective:
            def value(model: RoutedModel, step: int) -> Tensor:
                drawn = -torch.rand(clients, generator=generator).clamp_min(1e-30).log()  # normalised, a flat Dirichlet
                preference = model.parts.get_buffer("preference")
                preference.copy_(drawn / drawn.sum())
                (x, y), owner = batches[step % len(batches)], whose[step % len(batches)]
                outputs = as_batch(model(x))
                losses = reading.of(model, batches)(x, outputs, y).losses(outputs, y).reshape(len(outputs), -1).mean(1)
                counts = torch.bincount(owner, minlength=clients)
                return (preference[owner] / counts[owner] * losses).sum()

            return value

        return of
