"""What makes a routed model of the shared one: experts, and gates that weigh them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.routing.gate import Gate
from fedmerge.state import State, accumulator_dtype

__all__ = ["LEFT", "RIGHT", "Routing"]

LEFT, RIGHT = ":left", ":right"
"""Behind the name of a tensor that an expert holds as a product of two: ``left @ right``, its rows and the rest."""


@dataclass(frozen=True)
class Routing:
    """Where a model is routed: ``theta + sum_i g_i delta_i``, g being what a gate says of an input.

    Parameters
    ----------
    gates
        By the name of the module whose tensors they weigh; ``""`` for the whole model. No module lies within another.
    experts
        What each expert adds, by names of parameters: whole, or as two factors, see :data:`LEFT`.
    clients
        Whose experts they are, in order.
    origin
        What experts are added to; for names that are missing here, the shared model's tensor.
    preference
        What gates look at that look at no input, [numbers].
    own
        Clients' own preferences, where these gates give each client a model of its own.

    Examples
    --------
    >>> gate = Gate(looks_at=None)
    >>> experts = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    >>> routing = Routing({"": gate}, experts, (0, 1), preference=torch.tensor([0.5, 0.5]))
    >>> routing.unloaded({"w": torch.ones(2)})["w"]
    tensor([1.5000, 2.0000])
    """

    gates: Mapping[str, Gate]
    experts: tuple[State, ...]
    clients: tuple[int, ...]
    origin: State = field(default_factory=dict)
    preference: Tensor | None = None
    own: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def looks_at_inputs(self) -> bool:
        """Whether the model depends on what it is shown; otherwise it is one plain model for each preference."""
        return any(gate.looks_at is not None for gate in self.gates.values())

    @property
    def bytes(self) -> int:
        """What it takes to send it to a client that knows the shared model, and the one that all started from."""
        tensors = [tensor for expert in self.experts for tensor in expert.values()]
        tensors += [tensor for gate in self.gates.values() for layer in gate.layers for tensor in layer]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def bytes_of(self, client: int, shared: State) -> int:
        """What it takes to send a client its own plain model, where gates look at no input.

        Its values of all that is routed; or, where its preference is the weights and names few experts, these experts.
        """
        names = [name for module in self.gates for name in self.names(module)]
        values = sum((shared[name].numel() * shared[name].element_size() for name in names), 0)
        wanted = self.own.get(client, self.preference)
        if wanted is None or any(gate.layers for gate in self.gates.values()):
            return values
        named = [self.experts[place] for place in wanted.nonzero().flatten().tolist()]
        factors: int = sum(t.numel() * t.element_size() for expert in named for t in expert.values())
        return min(values, factors)

    def names(self, module: str) -> list[str]:
        """Names of the parameters that are routed in a module of this name."""
        start = f"{module}." if module else ""
        known = (name.removesuffix(LEFT) for name in self.experts[0] if not name.endswith(RIGHT))
        return [name for name in known if name.startswith(start)]

    def delta(self, expert: int, name: str) -> Tensor:
        """What an expert adds to a parameter."""
        held = self.experts[expert]
        return held[name] if name in held else held[name + LEFT] @ held[name + RIGHT]

    def point(self, module: str, weights: Tensor, shared: State) -> dict[str, Tensor]:
        """The module's routed parameters at some weights [experts], by their names in the model."""
        found = {}
        for name in self.names(module):
            like = shared[name]
            total = self.origin.get(name, like).to(accumulator_dtype(like.dtype))
            for expert in range(len(self.experts)):
                total = total + weights[expert].to(total) * self.delta(expert, name).reshape(like.shape).to(total)
            found[name] = total.to(like.dtype)
        return found

    def unloaded(
        self, shared: State, preference: Tensor | None = None, tied: Mapping[str, str] | None = None
    ) -> dict[str, Tensor]:
        """The shared model with what gates make of it that look at no input.

        Parameters
        ----------
        shared
            All tensors of the shared model.
        preference
            What these gates look at; the routing's own where not given.
        tied
            By further names of shared parameters, their first.

        Raises
        ------
        InvalidOption
            The preference is not as long as the gates want it.
        """
        wanted = self.preference if preference is None else torch.as_tensor(preference, dtype=torch.float32)
        own = dict(shared)
        for module, gate in self.gates.items():
            if gate.looks_at is None:
                own |= self.point(module, self._weights(gate, wanted), shared)
        return own | {alias: own[name] for alias, name in (tied or {}).items() if alias in own and name in own}

    def _weights(self, gate: Gate, preference: Tensor | None) -> Tensor:
        width = gate.layers[0][0].shape[1] if gate.layers else len(self.experts)
        if preference is None or preference.shape != (width,):
            given = "none" if preference is None else list(preference.shape)
            raise InvalidOption(f"a preference is {width} numbers, one for each of clients {self.clients}; got {given}")
        device = gate.layers[0][0].device if gate.layers else preference.device
        return gate.weights(preference.to(device)[None])[0]

    def of_client(self, client: int) -> Routing:
        """The routing at a client's own preference, where it has one."""
        return replace(self, preference=self.own[client]) if client in self.own else self

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as tensors: what a message, a checkpoint and a module's ``state_dict`` hold."""
        facts: dict[str, Any] = {"clients": list(self.clients), "gates": []}
        tensors: dict[str, Tensor] = {}
        for number, (module, gate) in enumerate(self.gates.items()):
            told = {"module": module, "looks_at": gate.looks_at, "layers": len(gate.layers)}
            facts["gates"].append({**told, "softmax": gate.softmax, "normalise": gate.normalise})
            for place, (weight, bias) in enumerate(gate.layers):
                tensors |= {f"gates.{number}.{place}.weight": weight, f"gates.{number}.{place}.bias": bias}
        for number, expert in enumerate(self.experts):
            tensors |= {f"experts.{number}.{name}": tensor for name, tensor in expert.items()}
        tensors |= {f"origin.{name}": tensor for name, tensor in self.origin.items()}
        if self.preference is not None:
            tensors["preference"] = self.preference
        tensors |= {f"own.{client}": preference for client, preference in self.own.items()}
        return {"facts": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8), **tensors}

    @classmethod
    def from_tensors(cls, tensors: State) -> Routing:
        """The reverse of :meth:`to_tensors`.

        Raises
        ------
        InvalidOption
            They are no routing.

        Examples
        --------
        >>> routing = Routing({"": Gate()}, ({"w": torch.ones(1)},), (7,))
        >>> Routing.from_tensors(routing.to_tensors()).clients
        (7,)
        """
        try:
            facts = json.loads(bytes(tensors["facts"].to(torch.uint8).tolist()))
            gates = {one["module"]: _gate(number, one, tensors) for number, one in enumerate(facts["gates"])}
            clients = tuple(int(client) for client in facts["clients"])
        except (LookupError, TypeError, ValueError) as error:
            raise InvalidOption(f"these tensors are no routing: {type(error).__name__}: {error}") from error
        experts = tuple(_below(f"experts.{number}.", tensors) for number in range(len(clients)))
        own = {int(client): preference for client, preference in _below("own.", tensors).items()}
        return cls(gates, experts, clients, _below("origin.", tensors), tensors.get("preference"), own)


def _gate(number: int, facts: Mapping[str, Any], tensors: State) -> Gate:
    places: Sequence[int] = range(facts["layers"])
    layers = tuple((tensors[f"gates.{number}.{i}.weight"], tensors[f"gates.{number}.{i}.bias"]) for i in places)
    return Gate(layers, facts["looks_at"], facts["softmax"], facts["normalise"])


def _below(start: str, tensors: State) -> dict[str, Tensor]:
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}
