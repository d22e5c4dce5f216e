"""SMEAR: soft merging of experts by a router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedmerge.aggregators.routed import (
    Routed,
    chosen_modules,
    differences,
    has_labels,
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
from fedmerge.state import State
from fedmerge.tasks.reading import called_as_told
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Smear"]


@register("smear", paper="arXiv:2306.03745")
@dataclass(frozen=True)
class Smear(Routed):
    """Chosen layers whose parameters are, for each example, a mean of all clients' with weights from a router.

    Muqeeth et al. 2023, section 3: ``pi = softmax(R LayerNorm(h) + b)``, h being the layer's input averaged over
    tokens, and the layer has the parameters ``sum_i pi_i theta_i``. Weights add up to 1, so that clients that agree
    keep their model whatever the router says. It begins at the clients' shares of the examples, which is FedAvg. The
    authors train adapters and routers together from the start; here the clients' layers are the experts, as they are
    after their own training, and only routers learn on the server. There is no dropping of experts.

    Parameters
    ----------
    layers
        Patterns of the modules to route, divided by spaces; all linear layers where empty.
    objective
        ``"loss"``, which needs labels; ``"entropy"`` of predictions; or ``"auto"``: loss where the server has labels.
    steps, learning_rate
        Of Adam; a step is one batch of the server's data. Without steps it is FedAvg.
    scale
        See :class:`~fedmerge.aggregators.routed.Routed`; of what is not routed.

    Examples
    --------
    >>> import fedmerge, torch
    >>> from torch import nn
    >>> base, first, second = (nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3))
    >>> routed = fedmerge.merge([first, second], "smear", base=base, data=torch.randn(8, 2), steps=2)
    >>> routed(torch.randn(5, 2)).shape
    torch.Size([5, 2])
    """

    layers: str = ""
    objective: Literal["auto", "loss", "entropy"] = "auto"
    steps: int = 100
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word(self, "objective", ("auto", "loss", "entropy"))
        check_count(self, "steps", 0)
        check_range(self, "learning_rate", 0.0, float("inf"), open_low=True, open_high=True)

    def route(self, shared: State, updates: Sequence[ClientUpdate], context: MergeContext) -> Routing:
        """Routers at the chosen layers, trained on the server's data."""
        batches = server_batches(context, "Smear", labelled=self.objective == "loss")
        what: Literal["entropy", "loss"] = (
            "loss" if has_labels(context.data) and self.objective != "entropy" else "entropy"
        )
        module, trained = self.module(shared, context), trained_names(updates, context)
        names = chosen_modules(module, self.layers, trained)
        widths = widths_seen(called_as_told(module, context.task, batches[0][0]), names, batches[0][0])
        share, generator = shares(updates), context.torch_generator("smear")
        gates = {
            name: Gate.fresh(width, share, name, softmax=True, normalise=True, generator=generator)
            for name, width in widths.items()
        }
        routed = within(trained, gates)
        experts = differences(updates, shared, routed, shared)  # weights add up to 1: relative to anything alike
        return fit_gates(
            RoutedModel(module, Routing(gates, experts, tuple(update.client for update in updates))),
            batches,
            lambda there: objective(what, there, context.task, "Smear"),
            steps=self.steps,
            learning_rate=self.learning_rate,
            task=context.task,
        )
