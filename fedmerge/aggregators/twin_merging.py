"""Twin-Merging: what clients share, and in small what each has of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedmerge.aggregators.routed import (
    Routed,
    differences,
    has_labels,
    owners,
    server_batches,
    trained_names,
    widths_seen,
)
from fedmerge.aggregators.searched import shares
from fedmerge.aggregators.task_vectors import is_matrix
from fedmerge.inputs import arguments_of
from fedmerge.lookup.option_checks import check_count, check_range, check_word
from fedmerge.registry import register
from fedmerge.routing import Gate, RoutedModel, Routing
from fedmerge.routing.gate_fitting import Objective, fit_gates
from fedmerge.routing.mixing import features
from fedmerge.routing.routing import LEFT, RIGHT
from fedmerge.state import State
from fedmerge.tasks.reading import called_as_told
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["TwinMerging"]


@register("twin_merging", paper="arXiv:2406.15479")
@dataclass(frozen=True)
class TwinMerging(Routed):
    """A shared model, and for each client the strongest directions of what is its own; a router adds them by input.

    Lu et al. 2024, algorithm 1: ``theta_s = theta_0 + lambda sum_i tau_i``; ``e_i``, the difference of the client's
    model to it, keeps of each matrix the largest singular values; an input gets the parameters
    ``theta_s + sum_i softmax(router)_i e_i``. The router, a network with one hidden layer, sees what the last linear
    layer of theta_s sees, and learns from which client an example comes: of the server's labelled examples, the client
    whose own model serves it best, see :func:`~fedmerge.aggregators.routed.owners`. Vectors stay whole.

    Where the server has no labelled data, no router is wanted: every client gets ``theta_s + e_i`` for a model of its
    own, and what is tested is theta_s. :func:`fedmerge.personal_models` gives these models.

    Parameters
    ----------
    kept
        Share of each matrix's singular values that is kept, in [0, 1]: at least one of them, none for 0; 0.1 in the
        paper. At 1 a certain router picks a client's model.
    by
        ``"inputs"`` for a router, ``"clients"`` for own models, ``"auto"``: a router where the server has labels.
    hidden
        Width of the router's hidden layer, 0 for none; 1024 in the paper.
    steps, learning_rate
        Of Adam, on the router's cross-entropy; a step is one batch of the server's data.
    scale
        lambda, see :class:`~fedmerge.aggregators.routed.Routed`; 0.29 in the paper.

    Examples
    --------
    >>> import fedmerge
    >>> base, first, second = (nn.Linear(2, 1, bias=False) for _ in range(3))
    >>> for model, row in ((base, [0.0, 0.0]), (first, [4.0, 0.0]), (second, [0.0, -2.0])):
    ...     _ = model.weight.data.copy_(torch.tensor([row]))
    >>> [one.weight.tolist() for one in fedmerge.personal_models([first, second], "twin_merging", base=base)]
    [[[4.0, 0.0]], [[0.0, -2.0]]]
    """

    requires_data: ClassVar[bool] = False
    requires_model: ClassVar[bool] = False

    kept: float = 0.1
    by: Literal["auto", "inputs", "clients"] = "auto"
    hidden: int = 64
    steps: int = 200
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "kept", 0.0, 1.0)
        check_word(self, "by", ("auto", "inputs", "clients"))
        check_count(self, "hidden", 0)
        check_count(self, "steps", 0)
        check_range(self, "learning_rate", 0.0, float("inf"), open_low=True, open_high=True)

    def route(self, shared: State, updates: Sequence[ClientUpdate], context: MergeContext) -> Routing:
        """What each client has of its own, and a router where it is wanted and can be had."""
        whole = differences(updates, shared, trained_names(updates, context), shared)
        experts, clients = tuple(map(self._compressed, whole)), tuple(update.client for update in updates)
        each = torch.eye(len(updates))
        own = {client: each[place].clone() for place, client in enumerate(clients)}
        labelled = has_labels(context.data)
        if self.by == "clients" or (self.by == "auto" and not (labelled and context.model_fn)):
            return Routing({"": Gate()}, experts, clients, preference=torch.zeros(len(clients)), own=own)
        return self._with_router(shared, updates, experts, context)

    def _compressed(self, expert: State) -> dict[str, Tensor]:
        """Matrices as products of two factors, where these are smaller."""
        small: dict[str, Tensor] = {}
        for name, tensor in expert.items():
            rows, columns = len(tensor) if tensor.ndim else 1, max(1, tensor[0].numel() if is_matrix(tensor) else 1)
            rank = math.ceil(self.kept * min(rows, columns) - 1e-9) if is_matrix(tensor) else 0
            if not self.kept:
                small[name] = torch.zeros_like(tensor)
            elif not is_matrix(tensor) or tensor.is_complex() or rank == min(rows, columns):
                small[name] = tensor
            else:
                u, s, v = torch.linalg.svd(tensor.reshape(rows, columns).double(), full_matrices=False)
                small[name + LEFT] = (u[:, :rank] * s[:rank]).to(tensor.dtype)
                small[name + RIGHT] = v[:rank].to(tensor.dtype)
        return small

    def _with_router(
        self, shared: State, updates: Sequence[ClientUpdate], experts: Sequence[State], context: MergeContext
    ) -> Routing:
        batches, module = server_batches(context, "TwinMerging", labelled=True), self.module(shared, context)
        called = called_as_told(module, context.task, batches[0][0])
        linear = [name for name, part in called.named_modules() if name and isinstance(part, nn.Linear)]
        widths = widths_seen(called, linear, batches[0][0]) if linear else {}
        # The layer that is called last gives the outputs; a model without any is told by its inputs.
        last, width = (list(widths.items()) or [("", features(None, (batches[0][0],), {}).shape[1])])[-1]
        generator = context.torch_generator("twin_merging router")
        gate = Gate.fresh(width, shares(updates), last, hidden=self.hidden, softmax=True, generator=generator)
        routing = Routing({"": gate}, tuple(experts), tuple(update.client for update in updates))
        return fit_gates(
            RoutedModel(module, routing),
            batches,
            _told_apart(owners(module, shared, updates, batches, context.task)),
            steps=self.steps,
            learning_rate=self.learning_rate,
            task=context.task,
        )


def _told_apart(whose: Sequence[Tensor]) -> Callable[[Sequence[tuple[Any, Tensor]]], Objective]:
    """The cross-entropy of the router's weights, given whose each example is."""

    def of(batches: Sequence[tuple[Any, Tensor]]) -> Objective:
        def value(model: RoutedModel, step: int) -> Tensor:
            (inputs, _), owner = batches[step % len(batches)], whose[step % len(batches)]
            args, kwargs = arguments_of(model, inputs)
            weights = model.chosen(*args, **kwargs)
            return -weights.clamp_min(1e-12).log().gather(1, owner[:, None]).mean()

        return value

    return of
