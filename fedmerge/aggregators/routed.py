"""What methods have in common whose result is a shared model with a router."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.task_vectors import TaskVectors
from fedmerge.errors import InvalidOption, UnknownName
from fedmerge.inputs import OnDeviceOf, examples_in
from fedmerge.lookup.option_checks import check_range
from fedmerge.models.resize import copy_of, refill
from fedmerge.routing import Routing
from fedmerge.routing.mixing import features
from fedmerge.state import State, accumulator_dtype, from_pairs
from fedmerge.tasks import Task, as_batch, reading_of
from fedmerge.tasks.reading import called_as_told
from fedmerge.update import ClientUpdate, MergeContext

__all__ = [
    "Routed",
    "chosen_modules",
    "differences",
    "has_labels",
    "owners",
    "server_batches",
    "trained_names",
    "widths_seen",
    "within",
]


@dataclass(frozen=True)
class Routed(Aggregator):
    """Task arithmetic for the shared model, from which clients train on, and a routing of the clients' models.

    Subclasses say how inputs find their experts (:meth:`route`), once the shared model is complete. What is judged,
    given to clients and exported is the routed model, see :class:`~fedmerge.routing.RoutedModel`.

    Parameters
    ----------
    scale
        lambda, of every update in the shared model ``theta_0 + lambda sum_i tau_i``; where not given, each client's
        share of the examples, which is FedAvg.
    """

    requires_base: ClassVar[bool] = True
    requires_model: ClassVar[bool] = True
    requires_data: ClassVar[bool] = True

    scale: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_range(self, "scale", 0.0, float("inf"), open_high=True)

    @abstractmethod
    def route(self, shared: State, updates: Sequence[ClientUpdate], context: MergeContext) -> Routing | None:
        """How inputs find their experts.

        Parameters
        ----------
        shared
            The shared model, all tensors of it, as it leaves the merge.
        updates
            What was merged, trained parameters only.
        context
            The merge's; its base has trained parameters only.
        """

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """The shared model."""
        vectors = TaskVectors.of(updates, context, type(self).__name__)
        starts = self.starts(vectors.shares)
        merged = {}
        for name in vectors.names:
            total = vectors.base[name].to(accumulator_dtype(vectors.base[name].dtype), copy=True)
            for factor, vector in zip(starts.tolist(), vectors.each(name), strict=True):
                total += factor * vector
            merged[name] = total
        return merged, {}

    def starts(self, shares: Sequence[float]) -> Tensor:
        """The factor of each client's update in the shared model, [clients], float64."""
        return torch.tensor([share if self.scale is None else self.scale for share in shares], dtype=torch.float64)

    def module(self, shared: State, context: MergeContext) -> nn.Module:
        """The shared model as a module, in the types in which it runs.

        Raises
        ------
        InvalidOption
            Part of it is personal, so that no whole one is here, or nobody has said how to build it.
        """
        name = type(self).__name__
        if context.layout is not None and context.layout.personal:
            raise InvalidOption(
                f"{name} runs models on the server, and {context.layout.personal[0]!r} is personal: only clients have "
                "a whole model. Take emr or tall_masks, which look at weights"
            )
        return context.module(shared, name).eval()


def trained_names(updates: Sequence[ClientUpdate], context: MergeContext) -> list[str]:
    """Names of the parameters that experts are about: all but those that are frozen and equal in all models."""
    first = updates[0].state

    def still(name: str) -> bool:
        return name in context.frozen and all(torch.equal(update.state[name], first[name]) for update in updates)

    return [name for name in first if not still(name)]


def differences(
    updates: Sequence[ClientUpdate], start: State, names: Collection[str], like: State
) -> tuple[dict[str, Tensor], ...]:
    """``theta_i - start`` of some parameters, for each client, in the types of `like`."""
    moves = []
    for update in updates:
        states = ({n: one[n] for n in names} for one in (update.state, start))
        own, begun = (from_pairs(state, like) for state in states)
        types = {name: accumulator_dtype(like[name].dtype) for name in names}
        moves.append({n: (own[n].to(types[n]) - begun[n].to(types[n])).to(like[n].dtype) for n in names})
    return tuple(moves)


def chosen_modules(module: nn.Module, patterns: str, trained: Collection[str]) -> list[str]:
    """Names of the modules to be routed: those that patterns name, or all linear layers.

    Parameters
    ----------
    patterns
        Divided by spaces; ``*`` stands for anything. What lies within a chosen module belongs to it.
    trained
        Names of the parameters that clients train: modules without any are left out.

    Raises
    ------
    UnknownName
        A pattern names no module.
    InvalidOption
        No module is left.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
    >>> names = [name for name, _ in net.named_parameters()]
    >>> chosen_modules(net, "", names), chosen_modules(net, "1*", names)
    (['0', '1.0', '1.1'], ['1'])
    """
    known = {name: part for name, part in module.named_modules() if name}
    if patterns.split():
        for pattern in patterns.split():
            if not any(fnmatchcase(name, pattern) for name in known):
                raise UnknownName("module in layers", pattern, list(known))
        named = [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns.split())]
    else:
        # The projection behind attention is never called as a module.
        hidden = nn.modules.linear.NonDynamicallyQuantizableLinear
        named = [n for n, part in known.items() if isinstance(part, nn.Linear) and not isinstance(part, hidden)]
    whole = [name for name in named if not any(name.startswith(f"{other}.") for other in named)]
    chosen = [name for name in whole if any(parameter.startswith(f"{name}.") for parameter in trained)]
    if not chosen:
        raise InvalidOption(
            f"{type(module).__name__} has no trained linear layer to route: name modules, as in layers=blocks.*.mlp"
        )
    return chosen


def within(names: Iterable[str], modules: Collection[str]) -> list[str]:
    """Names of the parameters of some modules.

    Examples
    --------
    >>> within(["0.weight", "1.0.weight", "10.bias"], ["1", "0"])
    ['0.weight', '1.0.weight']
    """
    return [name for name in names if any(name.startswith(f"{module}.") for module in modules)]


def has_labels(batches: Iterable[Any] | None) -> bool:
    """Whether there are batches, all of them ``(inputs, targets)``."""
    read = list(batches or ())
    return bool(read) and all(isinstance(batch, tuple | list) and len(batch) == 2 for batch in read)


@torch.no_grad()
def owners(
    module: nn.Module,
    shared: State,
    updates: Sequence[ClientUpdate],
    batches: Sequence[tuple[Any, Tensor]],
    task: Task | None,
) -> list[Tensor]:
    """Whose each example of a batch is, [examples]: the place of the client whose own model has the least loss on it.

    On the server nobody has said from whom its examples come, and this is what labels tell. Of equals the first.

    Parameters
    ----------
    module
        The shared model; it is not changed.
    shared
        All its tensors, of which a client's model keeps what was not merged.
    """
    called = called_as_told(copy_of(module), task, batches[0][0]).eval()
    there, losses = list(OnDeviceOf(called, batches)), []
    reading = reading_of(task).of(called, there)
    for update in updates:
        refill(called, {**shared, **from_pairs(update.state, shared)})
        outputs = [(x, as_batch(called(x)), y) for x, y in there]
        losses.append([reading(x, out, y).losses(out, y).reshape(len(out), -1).mean(1) for x, out, y in outputs])
    return [torch.stack(each).nan_to_num(nan=torch.inf).argmin(0) for each in zip(*losses, strict=True)]


def server_batches(context: MergeContext, who: str, *, labelled: bool) -> list[tuple[Any, Tensor]]:
    """The server's batches, ``(inputs, targets)``; zeros for targets where there are none and none are wanted.

    Raises
    ------
    InvalidOption
        There are none, or they lack the labels.
    """
    batches = list(context.data or ())
    pairs = has_labels(batches)
    if labelled and not pairs:
        raise InvalidOption(f"{who} learns from labels: pass data= with (inputs, targets) batches")
    if not batches:
        raise InvalidOption(f"{who} learns from inputs on the server: pass data= (server_examples in a configuration)")
    if pairs:
        return [(inputs, targets) for inputs, targets in batches]
    alone = [batch[0] if isinstance(batch, tuple | list) else batch for batch in batches]
    return [(inputs, torch.zeros(examples_in(inputs))) for inputs in alone]


@torch.no_grad()
def widths_seen(module: nn.Module, names: Collection[str], inputs: Any) -> dict[str, int]:
    """How many numbers gates see at the inputs of these modules, for those that a forward pass calls, in that order.

    Raises
    ------
    InvalidOption
        None of them is called.
    """
    seen: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(called: nn.Module, args: Any, kwargs: Any) -> None:
            seen[name] = features(called, args, kwargs).shape[-1]

        return hook

    handles = [module.get_submodule(n).register_forward_pre_hook(note(n), with_kwargs=True) for n in names]
    try:
        module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise InvalidOption(f"none of {list(names)[:3]} is called when the model runs: route other modules")
    return seen
