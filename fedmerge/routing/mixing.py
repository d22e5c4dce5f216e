"""Calls of a module with the parameters that a gate chooses for each example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedmerge.errors import InvalidOption
from fedmerge.inputs import changed as with_tensors
from fedmerge.inputs import examples_in, joined, rows, tensors_of
from fedmerge.routing.routing import Routing
from fedmerge.state import State

__all__ = ["Mixing", "called", "features", "hooked"]


class Mixing:
    """What a hook makes of a module's call: its outputs with the parameters that a gate chooses."""

    def __init__(self, name: str, routing: Routing, shared: State) -> None:
        self.name, self.routing, self.shared = name, routing, shared
        self.busy = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """The outputs that take the place of the module's."""
        if self.busy:  # the module is being called with the parameters chosen
            return outputs
        weights = self.routing.gates[self.name].weights(features(module, args, kwargs))
        local = {name.removeprefix(f"{self.name}.") for name in self.routing.names(self.name)}
        if type(module) is nn.Linear and local <= {"weight", "bias"} and len(args) == 1:
            return self._linear(args[0], outputs, weights)
        self.busy = True
        try:
            return called(module, self.name, self.routing, weights, self.shared, args, kwargs)
        finally:
            self.busy = False

    def _linear(self, inputs: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        """Outputs are linear in weight and bias, so that mixing outputs is mixing parameters."""
        weight, bias = f"{self.name}.weight", f"{self.name}.bias"
        names, origin = self.routing.names(self.name), self.routing.origin
        if any(name in origin for name in names):
            parts = origin.get(weight, self.shared[weight]), origin.get(bias, self.shared.get(bias))
            changed = None if parts[1] is None else parts[1].to(inputs.dtype)
            outputs = F.linear(inputs, parts[0].to(inputs.dtype), changed)
        shaped = weights.reshape(len(weights), *[1] * (outputs.ndim - 2), -1).to(outputs.dtype)
        for expert in range(len(self.routing.experts)):
            moved = [
                self.routing.delta(expert, name).to(inputs.dtype) if name in names else None for name in (weight, bias)
            ]
            change = outputs.new_zeros(()) if moved[0] is None else F.linear(inputs, moved[0])
            change = change if moved[1] is None else change + moved[1]
            outputs = outputs + shaped[..., expert, None] * change
        return outputs


def features(module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a gate sees of a module's input: a row of numbers [examples, width] in float32.

    The mean over tokens or pixels of the first tensor; all numbers of the model's own inputs, where `module` is None.

    Raises
    ------
    InvalidOption
        There is no input of real numbers.
    """
    given = next((tensor for tensor in tensors_of((args, kwargs)) if tensor.ndim), None)
    if given is None or not given.is_floating_point():
        kind = "no tensor" if given is None else f"{given.dtype}"
        raise InvalidOption(f"a gate looks at real numbers, and this input is {kind}: route layers that see features")
    if module is None:
        return given.flatten(1).float() if given.ndim > 1 else given[:, None].float()
    if given.ndim <= 2:
        return given.float() if given.ndim == 2 else given[None].float()
    last = isinstance(module, nn.Linear) or (given.ndim == 3 and not isinstance(module, nn.Conv1d))
    return given.float().mean(tuple(range(1, given.ndim - 1)) if last else tuple(range(2, given.ndim)))


@contextmanager
def hooked(module: nn.Module, mixing: Callable[..., Any]) -> Iterator[None]:
    """Let `mixing` have its way with a module's outputs meanwhile."""
    handle = module.register_forward_hook(mixing, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def called(
    module: nn.Module,
    name: str,
    routing: Routing,
    weights: Tensor,
    shared: State,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A module's outputs, examples with the same weights together; each by itself where gradients go to weights."""
    start = len(name) + 1 if name else 0
    if examples_in((args, kwargs)) != len(weights):
        raise InvalidOption(f"module {name!r} is called with other examples than its gate has seen: route another one")
    if torch.is_grad_enabled() and weights.requires_grad:
        which, distinct = torch.arange(len(weights), device=weights.device), weights
    else:
        distinct, which = torch.unique(weights, dim=0, return_inverse=True)
    outputs, order = [], []
    for group, own in enumerate(distinct):
        index = (which == group).nonzero().flatten()
        tensors = {one[start:]: tensor for one, tensor in routing.point(name, own, shared).items()}
        own_args, own_kwargs = rows((args, kwargs), index)
        outputs.append(functional_call(module, tensors, own_args, own_kwargs))
        order.append(index)
    if len(outputs) == 1:
        return outputs[0]
    back, total = torch.cat(order).argsort(), len(weights)
    return with_tensors(joined(outputs), lambda one: one[back] if one.ndim and len(one) == total else one)
