"""A model whose parameters depend on its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedmerge.errors import InvalidOption
from fedmerge.inputs import changed as with_tensors
from fedmerge.inputs import examples_in, joined, rows, tensors_of
from fedmerge.models.copies import copy_of
from fedmerge.models.resize import refill
from fedmerge.routing.routing import Routing
from fedmerge.state import State, tied_names

__all__ = ["RoutedModel", "features"]


class _Tensors(nn.Module):
    """Tensors by dotted names, as modules within modules, so that a ``state_dict`` names them as they are named."""

    def __init__(self, tensors: State) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            holder: nn.Module = self
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, _Tensors({}))
                holder = holder.get_submodule(part)
            own = tensor.detach().clone()
            if path[:1] == ["gates"]:  # what may be trained
                holder.register_parameter(last, nn.Parameter(own))
            else:
                holder.register_buffer(last, own)


class RoutedModel(nn.Module):
    """The shared model with its routing: called like it, and its outputs are of the same form.

    Every example gets parameters of its own, whatever else is in its batch. It is made for evaluation: in a batch of
    which each example has its own parameters, a batch norm that is in training mode sees single examples.

    Parameters
    ----------
    model
        The shared model; it is copied.
    routing
        Its experts and gates.

    Raises
    ------
    InvalidOption
        The routing is of another model.

    Examples
    --------
    >>> from fedmerge.routing import Gate
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> picks = Gate(((torch.tensor([[500.0], [-500.0]]), torch.zeros(2)),), looks_at="", softmax=True)
    >>> experts = {"weight": torch.tensor([[3.0]])}, {"weight": torch.tensor([[-1.0]])}
    >>> RoutedModel(layer, Routing({"": picks}, experts, (0, 1)))(torch.tensor([[2.0], [-2.0]])).tolist()
    [[6.0], [2.0]]
    """

    def __init__(self, model: nn.Module, routing: Routing) -> None:
        super().__init__()
        _check(model, routing)
        self.model = copy_of(model)
        device = next((p.device for p in model.parameters()), None)
        self.parts = _Tensors(routing.to_tensors()).to(device)
        self.train(model.training)

    @classmethod
    def from_state(cls, model: nn.Module, state: State) -> RoutedModel:
        """The routed model that a ``state_dict`` is of, such as a file of ``fedmerge merge`` holds.

        Parameters
        ----------
        model
            Of the architecture that was merged; its values do not matter.
        state
            All tensors, under the names of :meth:`state_dict`.

        Raises
        ------
        InvalidOption
            It is the state of no routed model, or of one of another architecture.

        Examples
        --------
        >>> from fedmerge.routing import Gate
        >>> routed = RoutedModel(nn.Linear(1, 1), Routing({"": Gate()}, ({"bias": torch.ones(1)},), (0,)))
        >>> RoutedModel.from_state(nn.Linear(1, 1), routed.state_dict()).routing.clients
        (0,)
        """
        shared, parts = ({n[6:]: t for n, t in state.items() if n.startswith(start)} for start in ("model.", "parts."))
        if not shared or not parts:
            raise InvalidOption("this is the state of no routed model: its names begin with model. and parts.")
        try:
            return cls(refill(copy_of(model), shared), Routing.from_tensors(parts))
        except RuntimeError as error:
            raise InvalidOption(
                f"the shared model in it is another one than {type(model).__name__}: {error}"
            ) from error

    @property
    def routing(self) -> Routing:
        """The experts and gates, as they are now."""
        return Routing.from_tensors({**dict(self.parts.named_buffers()), **dict(self.parts.named_parameters())})

    @property
    def called_like(self) -> nn.Module:
        """The module whose ``forward`` says how this one is called."""
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the shared model, each example's with its own parameters."""
        routing = self.routing
        shared = dict(self.model.named_parameters(remove_duplicate=False))
        gate = routing.gates.get("")
        if gate is not None and gate.looks_at is not None:
            weights = gate.weights(self._seen(gate.looks_at, args, kwargs))
            return _called(self.model, "", routing, weights, shared, args, kwargs)
        still = {name: t for name, t in routing.unloaded(shared).items() if t is not shared[name]}
        with ExitStack() as hooks:
            for name, one in routing.gates.items():
                if one.looks_at is not None:
                    module = self.model.get_submodule(name)
                    hooks.enter_context(_hooked(module, _Mixing(name, routing, shared)))
            return functional_call(self.model, still, args, kwargs) if still else self.model(*args, **kwargs)

    def of_preference(self, preference: Sequence[float] | Tensor) -> nn.Module:
        """The plain model for a preference, where gates look at no input, as those of ``pwe_moe``.

        Raises
        ------
        InvalidOption
            Gates look at inputs, or the preference is not one number for each client.
        """
        if self.routing.looks_at_inputs:
            raise InvalidOption("this model's gates look at its inputs: call it, there is no plain model in it")
        state = self.routing.unloaded(self.model.state_dict(), torch.as_tensor(preference), tied_names(self.model))
        return refill(copy_of(self.model), state)

    def of_client(self, client: int) -> nn.Module:
        """A client's own plain model, where gates look at no input.

        Raises
        ------
        InvalidOption
            The client has none.
        """
        own = self.routing.own
        if client not in own:
            raise InvalidOption(f"client {client} has no model of its own here: those who have: {sorted(own)}")
        return self.of_preference(own[client])

    def _seen(self, looks_at: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not looks_at:
            return features(None, args, kwargs)
        seen: list[Tensor] = []
        module = self.model.get_submodule(looks_at)
        handle = module.register_forward_pre_hook(
            lambda called, own_args, own_kwargs: seen.append(features(called, own_args, own_kwargs)), with_kwargs=True
        )
        try:
            with torch.no_grad():
                self.model(*args, **kwargs)
        finally:
            handle.remove()
        return seen[-1]


class _Mixing:
    """What a hook makes of a module's call: its outputs with the parameters that a gate chooses."""

    def __init__(self, name: str, routing: Routing, shared: State) -> None:
        self.name, self.routing, self.shared = name, routing, shared
        self.busy = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        if self.busy:  # the module is being called with the parameters chosen
            return outputs
        weights = self.routing.gates[self.name].weights(features(module, args, kwargs))
        local = {name.removeprefix(f"{self.name}.") for name in self.routing.names(self.name)}
        if type(module) is nn.Linear and local <= {"weight", "bias"} and len(args) == 1:
            return self._linear(args[0], outputs, weights)
        self.busy = True
        try:
            return _called(module, self.name, self.routing, weights, self.shared, args, kwargs)
        finally:
            self.busy = False

    def _linear(self, inputs: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        """Outputs are linear in weight and bias, so that mixing outputs is mixing parameters."""
        weight, bias = f"{self.name}.weight", f"{self.name}.bias"
        names, origin = self.routing.names(self.name), self.routing.origin
        if any(name in origin for name in names):
            parts = [origin.get(name, self.shared.get(name)) for name in (weight, bias)]
            outputs = F.linear(inputs, *(None if part is None else part.to(inputs.dtype) for part in parts))
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
def _hooked(module: nn.Module, mixing: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(mixing, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _called(
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
        distinct, which = weights.unique(dim=0, return_inverse=True)
    found, order = [], []
    for group, own in enumerate(distinct):
        index = (which == group).nonzero().flatten()
        tensors = {one[start:]: tensor for one, tensor in routing.point(name, own, shared).items()}
        own_args, own_kwargs = rows((args, kwargs), index)
        found.append(functional_call(module, tensors, own_args, own_kwargs))
        order.append(index)
    if len(found) == 1:
        return found[0]
    back, total = torch.cat(order).argsort(), len(weights)
    return with_tensors(joined(found), lambda one: one[back] if one.ndim and len(one) == total else one)


def _check(model: nn.Module, routing: Routing) -> None:
    """Make sure that all that is routed is in the model."""
    known = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    modules = dict(model.named_modules(remove_duplicate=False))
    for module, gate in routing.gates.items():
        for name in (module, gate.looks_at or ""):
            if name not in modules:
                raise InvalidOption(f"{name!r} is routed, and the model has no module of this name")
        for name in routing.names(module):
            if name not in known or routing.delta(0, name).numel() != known[name].numel():
                raise InvalidOption(f"the expert's {name!r} does not fit the model: build it of the model merged")
