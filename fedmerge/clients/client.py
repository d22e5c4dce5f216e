"""What all clients of a process are made of: model, data, training, and whatever goes wrong on purpose; how an order
reaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor, nn

from fedmerge.adapters import OwnRanks
from fedmerge.clients.group import Instructions, Received
from fedmerge.clients.model_outputs import check_outputs
from fedmerge.clients.own_parts import ABOUT_PARTS, OwnParts, OwnPartsOf
from fedmerge.data.client_data import ClientData
from fedmerge.data.example_sets import Examples
from fedmerge.errors import InvalidOption, ModelError
from fedmerge.models.resize import copy_of, resize
from fedmerge.state import State
from fedmerge.tasks import Task
from fedmerge.training.device import choose_device
from fedmerge.training.local import LocalTraining
from fedmerge.training.model_on_data import ModelSnapshot
from fedmerge.wire.flower_records import RULE_RECORD
from fedmerge.wire.keys import LINEARISED_KEY, PERSONAL_KEY, ROUTING
from fedmerge.wire.record_values import strings, view_arrays

__all__ = ["Client", "Mishaps", "Tamper", "receive", "sent_model"]

Tamper = Callable[[State, State, int, int], State]
"""``tamper(state, base, client, round)``: the parameters that a client sends, having trained from `base` to `state`."""


class Mishaps(Protocol):
    """What befalls clients in a round: how simulations study faults."""

    def begin(self, client: int, round: int) -> None:
        """Called before a client trains; raises where that client crashes."""

    def sends_well(self, client: int, round: int) -> bool:
        """Whether :meth:`sent` leaves this client's update as it is."""

    def sent(self, state: State, client: int, round: int) -> State:
        """The tensors that arrive instead of `state`."""


class _Working:
    """A module in which one client after the other trains."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.checked = module, False
        self.shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        self._fresh = ModelSnapshot(module)

    @torch.no_grad()
    def filled(self, state: State, like: nn.Module) -> nn.Module:
        """The module with these tensors, as good as new."""
        # What a client before has left in it, in buffers that do not travel or in attributes, is none of this one's.
        self._fresh.restore(parameters=False)
        for name, tensor in self.module.state_dict().items():
            tensor.copy_(state[name])
        for parameter, original in zip(self.module.parameters(), like.parameters(), strict=True):
            parameter.requires_grad_(original.requires_grad).grad = None
        return self.module


@dataclass
class Client:
    """The client side of a process; holds nothing of any one client, for a process serves many.

    Parameters
    ----------
    model_fn, data_fn, training, device, own_model_fn, tamper, mishaps, noise_seed, task, personal, own_ranks
        As for :func:`fedmerge.clients.client_app`.
    mods
        Whether mods may read a message's configuration besides.
    """

    model_fn: Callable[[], nn.Module]
    data_fn: Callable[[int, int], ClientData]
    training: LocalTraining
    device: str
    own_model_fn: Callable[[int], nn.Module] | None = None
    tamper: Tamper | None = None
    mishaps: Mishaps | None = None
    noise_seed: int | None = None
    mods: bool = False
    task: Task | None = None
    personal: tuple[str, ...] = ()
    own_ranks: OwnRanks | None = None
    _resized: _Working | None = field(default=None, init=False, repr=False)
    _told: dict[tuple[str, ...], Client] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.training.linearised and self.own_model_fn is not None:
            raise InvalidOption(
                "training.linearised expands the model around what model_fn makes, and own_model_fn has clients start "
                "apart from it: leave one out"
            )

    def told(self, config: ConfigRecord) -> Client:
        """The client side whose model is linearised as a message's configuration says; this one where it says nothing.

        Raises
        ------
        InvalidOption
            Clients start apart.
        """
        if LINEARISED_KEY not in config:
            return self
        patterns = tuple(strings(config, LINEARISED_KEY))
        if patterns == tuple(self.training.linearised):
            return self
        if patterns not in self._told:
            self._told[patterns] = replace(self, training=replace(self.training, linearised=patterns))
        return self._told[patterns]

    @cached_property
    def template(self) -> nn.Module:
        """A model of the architecture; only values of what does not travel matter."""
        model = self.model_fn()
        if not isinstance(model, nn.Module):
            raise ModelError(f"model_fn returned a {type(model).__name__}: return the module that it builds")
        return self.training.trained_as(model.to(choose_device(self.device)))

    @cached_property
    def float_buffers(self) -> frozenset[str]:
        """Names of the model's buffers that are no counters, such as the statistics of batch norms."""
        return frozenset(name for name, b in self.template.named_buffers() if b.is_floating_point())

    @cached_property
    def _all_travels(self) -> bool:
        """Whether the model has nothing that is frozen or personal, unless a message says otherwise."""
        return not self.personal and all(parameter.requires_grad for parameter in self.template.parameters())

    @cached_property
    def _parts(self) -> OwnPartsOf:
        return OwnPartsOf(self.template, self.personal)

    def parts(self, config: ConfigRecord, training: LocalTraining | None = None) -> OwnParts | None:
        """What of the model does not travel, under a message's configuration; None where all of it does.

        Raises
        ------
        ConfigError, ModelError
            The server's frozen or personal tensors are others than the client's.
        """
        training = training or self.training
        if self._all_travels and not training.personal_epochs and not any(key in config for key in ABOUT_PARTS):
            return None
        return self._parts.told(config, strings(config, PERSONAL_KEY), training.frozen_mode)

    def shared_template(self, parts: OwnParts | None) -> nn.Module:
        """The template, of which nothing that is personal is measured."""
        return self.template if parts is None else self._parts.shared(parts.layout)

    def fitted(self, state: State) -> nn.Module:
        """A model with these tensors, at their widths; the same one for every client, which nobody keeps.

        Raises
        ------
        ModelError
            They are of another architecture.
        """
        shapes = {name: tensor.shape for name, tensor in state.items()}
        working = self._usual
        if working.shapes != shapes:
            working = self._other(state, shapes)
        try:
            return working.filled(state, self.template)
        except RuntimeError as error:
            raise self._misfit(error) from error

    def own_model(self, told: Instructions, client: int) -> nn.Module | None:
        """What a client starts from instead of the model sent, where clients start apart."""
        if self.own_model_fn is None or not self.first_is_own(told):
            return None
        return self.own_model_fn(client).to(choose_device(self.device))

    def starts_apart(self, told: Instructions) -> bool:
        """Whether clients start from tensors of their own that no stack holds: other models, or a rule's."""
        ruled = told.rule is not None and told.rule.starts_apart
        return ruled or self.first_is_own(told) or self.own_ranks is not None

    def first_is_own(self, told: Instructions) -> bool:
        """Whether clients start this order from models that ``own_model_fn`` makes."""
        return self.own_model_fn is not None and told.server_round <= 1 and not told.stage

    def check_outputs(self, model: nn.Module, data: Examples) -> None:
        """Make sure that a model of other widths goes with this client's own, see :func:`check_outputs`."""
        working = next((one for one in (self._usual, self._resized) if one is not None and one.module is model), None)
        if working is None:
            check_outputs(model, self.template, data)
        elif not working.checked:
            check_outputs(model, self.template, data)
            working.checked = True

    @contextmanager
    def telling(self, model: nn.Module) -> Iterator[None]:
        """Say what is wrong where a model of other widths than usual, which a message brought, does not run."""
        try:
            yield
        except (IndexError, RuntimeError, ValueError) as error:
            if model is self._usual.module:
                raise
            raise ModelError(f"the widths of the model sent do not go with this client's examples: {error}") from error

    @cached_property
    def _usual(self) -> _Working:
        return _Working(copy_of(self.template))

    def _other(self, state: State, shapes: dict[str, torch.Size]) -> _Working:
        """A module at the widths of `state`; the last one is kept, for all clients of a round are sent the same."""
        if self._resized is None or self._resized.shapes != shapes:
            try:
                self._resized = _Working(resize(self.template, state))
            except (ModelError, RuntimeError) as error:
                raise self._misfit(error) from error
        return self._resized

    def _misfit(self, error: Exception) -> ModelError:
        kind = type(self.template).__name__
        return ModelError(f"the model sent does not fit the {kind} that model_fn makes: {error}")


def receive(client: Client, content: RecordDict, state: State | None = None, what: str = "train") -> Received:
    """Read an order: its configuration, the model sent, and all further tensors.

    Parameters
    ----------
    client
        Whoever receives it.
    content
        The records of the message.
    state
        The model sent, where it is at hand already.
    what
        The kind of message, for errors.

    Raises
    ------
    ModelError
        It brings no model, or one that cannot be decoded.
    UnknownName, ConfigError, InvalidOption
        Its configuration cannot be read, or the server's frozen or personal tensors are others than the client's.
    """
    config = next(iter(content.config_records.values()), ConfigRecord())
    told = Instructions.read(config, client.training, alone=not client.mods)
    if state is None:
        state = sent_model(content, what)
    parts = client.parts(config, told.training)
    if parts is not None:
        parts.phases(told.training)  # what makes no sense is told before anybody trains
    return Received(told, state, content.array_records, parts)


def sent_model(content: RecordDict, what: str) -> dict[str, Tensor]:
    """The model that a message brings; to be read only.

    Raises
    ------
    ModelError
        There is none, or it cannot be decoded.
    """
    others = (RULE_RECORD, ROUTING)
    arrays = next((arrays for key, arrays in content.array_records.items() if key not in others), None)
    if arrays is None:
        raise ModelError(f"the {what} message brings no ArrayRecord with a model")
    try:
        return view_arrays(arrays)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"the model sent cannot be decoded: {error}") from error
