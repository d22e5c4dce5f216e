"""Straight-through re-basin: permutations chosen by the loss half-way between two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge.aggregators.aggregator import ServerData
from fedmerge.aggregators.aligning import Permuting
from fedmerge.errors import InvalidOption
from fedmerge.inputs import OnDeviceOf, examples_in
from fedmerge.lookup.option_checks import check_count, check_range
from fedmerge.matching.fairness import anchor_of, bounded
from fedmerge.matching.weight_costs import match_weights
from fedmerge.permutations import PermutationSpec
from fedmerge.registry import register
from fedmerge.state import State, accumulator_dtype
from fedmerge.tasks import Task, as_batch, reading_of
from fedmerge.tasks.reading import called_as_told
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["MidpointLoss", "StraightThroughRebasin"]


@register("ste_rebasin", paper="arXiv:2209.04836")
@dataclass(frozen=True)
class StraightThroughRebasin(Permuting):
    """Permutations under which the model half-way between two has the least loss on the server's labelled data.

    Ainsworth et al. 2023, algorithm 2. Free weights w begin at A. In each step B is matched to w by its weights, from
    the last match on, and w takes a step of SGD on the loss of ``A / 2 + (P(B) + w - stop(w)) / 2``: the gradient
    passes the matching as if w stood in its place. The authors keep the match of the least loss on a single batch;
    here every new match is judged on all of the data, and the order in which neurons came is one of them: by this
    loss, no merge of two equal shares is worse than without matching. All clients are matched to the most typical one,
    each by itself, in evaluation mode.

    Parameters
    ----------
    steps
        Of SGD, one batch each, at least 0; with 0 it is a single match of the weights, where that has less loss.
    learning_rate
        Of SGD, above 0.
    momentum
        Of SGD, in [0, 1).

    Examples
    --------
    >>> import fedmerge
    >>> _ = torch.manual_seed(0)
    >>> a, b = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    >>> order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    >>> b.load_state_dict({"0.weight": a[0].weight[order], "0.bias": a[0].bias[order],
    ...                    "2.weight": a[2].weight[:, order], "2.bias": a[2].bias})
    <All keys matched successfully>
    >>> x = torch.randn(50, 3)
    >>> merged = fedmerge.merge([a, b], "ste_rebasin", data=[(x, a(x).argmax(1))], steps=5)
    >>> torch.equal(merged[0].weight, a[0].weight)
    True
    """

    requires_data: ClassVar[bool] = True

    steps: int = 100
    learning_rate: float = 0.01
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "steps", 0)
        check_range(self, "learning_rate", 0.0, float("inf"), open_low=True, open_high=True)
        check_range(self, "momentum", 0.0, 1.0, open_high=True)

    @property
    def server_data(self) -> ServerData:
        """Labels: the loss is taken there."""
        return "labels"

    def permutations(
        self, spec: PermutationSpec, updates: Sequence[ClientUpdate], context: MergeContext
    ) -> list[list[Tensor]]:
        """Of every client, to the most typical one; of two, to the heavier."""
        batches = _labelled(context)
        trained = bounded([context.trained(u.state, "StraightThroughRebasin") for u in updates])
        anchor = anchor_of(trained, [u.weight for u in updates])
        perms = [spec.identity() for _ in updates]
        for j, update in enumerate(updates):
            if j != anchor:
                module = context.module(updates[anchor].state, "StraightThroughRebasin")
                loss = MidpointLoss(spec, module, updates[anchor].state, update.state, batches, context.task)
                generator = context.torch_generator(f"ste_rebasin {update.client}")
                perms[j] = self._match(loss, trained[anchor], trained[j], generator)
        return perms

    def _match(self, loss: MidpointLoss, a: State, b: State, generator: torch.Generator) -> list[Tensor]:
        """The permutations of the least loss of all that a step came by."""
        spec = loss.spec
        best = seen = spec.identity()
        reached = loss.of(best)
        floats = {n: t.detach() for n, t in a.items() if t.is_floating_point()}
        free = {n: t.to(accumulator_dtype(t.dtype), copy=True).requires_grad_() for n, t in floats.items()}
        optimiser = torch.optim.SGD(list(free.values()), self.learning_rate, self.momentum)
        batches = islice(cycle(loss.batches), self.steps)
        while True:
            target = {n: t.detach() for n, t in free.items()}
            perms, _ = match_weights(spec, target, b, start=seen, generator=generator)
            if any(not torch.equal(p, q) for p, q in zip(perms, seen, strict=True)):
                value = loss.of(perms)
                if value < reached:
                    best, reached = perms, value
            seen = perms
            batch = next(batches, None)
            if batch is None:
                return best
            with torch.enable_grad():
                optimiser.zero_grad()
                loss.at(perms, batch, free).backward()  # type: ignore[no-untyped-call]
            optimiser.step()


class MidpointLoss:
    """The loss of the model half-way between two, the neurons of the second being re-ordered.

    Parameters
    ----------
    spec
        The symmetries of both.
    module
        Their architecture, with what neither of them holds.
    a, b
        The models, with their buffers: running statistics are averaged as well.
    batches
        ``(inputs, targets)``.
    task
        Whose loss; read from the labels where not given.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        module: nn.Module,
        a: State,
        b: State,
        batches: Sequence[tuple[Any, Tensor]],
        task: Task | None,
    ) -> None:
        self.spec, self._a, self._b = spec, a, b
        self.batches: list[tuple[Any, Tensor]] = list(OnDeviceOf(module, batches))
        self._module = called_as_told(module.eval(), task, self.batches[0][0])
        self._dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
        self._task = reading_of(task).of(self._module, self.batches)

    @torch.no_grad()
    def of(self, perms: Sequence[Tensor]) -> float:
        """The mean over all examples; infinite where it is no number."""
        total, count = 0.0, 0
        for batch in self.batches:
            number = examples_in(batch[0])
            total += float(self.at(perms, batch, {})) * number
            count += number
        mean = total / max(1, count)
        return mean if math.isfinite(mean) else math.inf

    def at(self, perms: Sequence[Tensor], batch: tuple[Any, Tensor], free: State) -> Tensor:
        """Of one batch, the mean over its examples, its gradient going to `free`."""
        moved = self.spec.apply(self._b, perms)
        point = {name: self._mean(name, tensor, moved[name]) for name, tensor in self._a.items()}
        for name, tensor in free.items():
            point[name] = point[name] + ((tensor - tensor.detach()) / 2).to(point[name].dtype)
        inputs, targets = batch
        outputs = as_batch(functional_call(self._module, point, (inputs,)))
        return self._task(inputs, outputs, targets).losses(outputs, targets).mean()

    def _mean(self, name: str, first: Tensor, other: Tensor) -> Tensor:
        """In the type in which the module runs; what counts (integers) is the first's."""
        if not (first.is_floating_point() or first.is_complex()):
            return first
        dtype = accumulator_dtype(first.dtype)
        return ((first.to(dtype) + other.to(dtype)) / 2).to(self._dtypes.get(name, dtype))


def _labelled(context: MergeContext) -> list[tuple[Any, Tensor]]:
    """The server's batches.

    Raises
    ------
    InvalidOption
        There are none, or they have no labels; or a part of the model is personal, so that no whole one is here.
    """
    if context.layout is not None and context.layout.personal:
        raise InvalidOption(
            f"ste_rebasin judges models on the server, and {context.layout.personal[0]!r} is personal: only clients "
            "have a whole model. Take rebasin or sinkhorn_rebasin, which look at weights"
        )
    batches = list(context.data or ())
    if not batches or not all(isinstance(b, tuple | list) and len(b) == 2 and len(b[1]) for b in batches):
        raise InvalidOption(
            "ste_rebasin judges models on the server: pass data= with (inputs, targets) batches "
            "(server_examples in a configuration)."
        )
    return [(batch[0], batch[1]) for batch in batches]
