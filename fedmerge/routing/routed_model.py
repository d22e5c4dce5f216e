"""A model whose parameters depend on its input."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge.errors import InvalidOption
from fedmerge.models.resize import copy_of, refill
from fedmerge.routing.mixing import Mixing, called, features, hooked
from fedmerge.routing.routing import Routing
from fedmerge.state import State, tied_names

__all__ = ["RoutedModel"]


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
            return called(self.model, "", routing, weights, shared, args, kwargs)
        still = {name: t for name, t in routing.unloaded(shared).items() if t is not shared[name]}
        with ExitStack() as hooks:
            for name, one in routing.gates.items():
                if one.looks_at is not None:
                    module = self.model.get_submodule(name)
                    hooks.enter_context(hooked(module, Mixing(name, routing, shared)))
            return functional_call(self.model, still, args, kwargs) if still else self.model(*args, **kwargs)

    def chosen(self, *args: Any, **kwargs: Any) -> Tensor:
        """How much each expert counts for each example, [examples, experts], where one gate weighs whole models.

        Raises
        ------
        InvalidOption
            Gates stand at single layers, or look at no input.
        """
        gate = self.routing.gates.get("")
        if gate is None or gate.looks_at is None:
            raise InvalidOption("no gate of this model weighs whole models by their input")
        return gate.weights(self._seen(gate.looks_at, args, kwargs))

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
            lambda there, own_args, own_kwargs: seen.append(features(there, own_args, own_kwargs)), with_kwargs=True
        )
        try:
            with torch.no_grad():
                self.model(*args, **kwargs)
        finally:
            handle.remove()
        return seen[-1]


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
