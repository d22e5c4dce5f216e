"""What a client does with a message: train, evaluate, measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import nn

from fedmerge.data.client_data import ClientData, client_data
from fedmerge.data.example_sets import Examples
from fedmerge.errors import ConfigError, ModelError
from fedmerge.models.copies import copy_of
from fedmerge.models.resize import resize
from fedmerge.seeding import torch_generator
from fedmerge.state import State
from fedmerge.strategies.measure import add_statistics, strings
from fedmerge.strategies.questions import answer_questions
from fedmerge.strategies.sent_model import check_outputs
from fedmerge.strategies.stages import keep, kept_model
from fedmerge.strategies.told_training import told_training
from fedmerge.strategies.wire import (
    CLIENT_KEY,
    PARTITION_KEY,
    STEPS_KEY,
    WITHHOLD_KEY,
    from_arrays,
    to_arrays,
    view_arrays,
)
from fedmerge.tasks import Task
from fedmerge.training.device import choose_device
from fedmerge.training.judged import Judged, judge
from fedmerge.training.local import LocalTraining, batches_to_measure, train
from fedmerge.training.model_snapshot import ModelSnapshot
from fedmerge.training.report import TrainingReport

__all__ = ["ClientSide", "Mishaps", "Tamper"]

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


_LOCAL_BUFFERS = "fedmerge.buffers"
_STAGES = 1 << 20  # more than there are rounds


@dataclass
class ClientSide:
    """The handlers; holds nothing of any one client, for a process serves many."""

    model_fn: Callable[[], nn.Module]
    data_fn: Callable[[int, int], ClientData]
    training: LocalTraining
    device: str
    own_model_fn: Callable[[int], nn.Module] | None
    tamper: Tamper | None = None
    mishaps: Mishaps | None = None
    noise_seed: int | None = None
    mods: bool = False
    """Whether mods may read a message's configuration besides."""
    task: Task | None = None

    @cached_property
    def template(self) -> nn.Module:
        """A model of the architecture; its values do not matter."""
        model = self.model_fn()
        if not isinstance(model, nn.Module):
            raise ModelError(f"model_fn returned a {type(model).__name__}: return the module that it builds")
        return model.to(choose_device(self.device))

    def train(self, message: Message, context: Context) -> Message:
        """Train the model sent."""
        partition, data = self._data(context)
        config = next(iter(message.content.config_records.values()), ConfigRecord())
        stage = _integer(config, "stage", 0)
        settings, seed, round = self.settings(config)
        # One that stayed until the first stage of a round was over stays to its end.
        mishaps = None if stage else self.mishaps
        if mishaps is not None:
            mishaps.begin(partition, round)
        model, config = self._receive(message, context, kept_model(message, context) if stage else None)
        model = self.own_model(config, partition) or model
        frozen = strings(config, "frozen")
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
        self.check_outputs(model, data.train)
        with self._told(model):
            report = self.fit(model, data.train, settings, seed=seed, client=partition, round=round)
        if config.get("batch-norm") == "local":
            buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
            context.state[_LOCAL_BUFFERS] = to_arrays(buffers)
        keep(context, config, model)
        wanted = strings(config, "send")
        sent = {n: t for n, t in model.state_dict().items() if not stage or n in wanted}
        if mishaps is not None:
            sent = dict(mishaps.sent(sent, partition, round))
        reply = RecordDict({"arrays": to_arrays(sent)})
        loss = {} if config.get(WITHHOLD_KEY) else {"train_loss": report.loss}
        reply["metrics"] = MetricRecord({"num-examples": len(data), **loss, STEPS_KEY: report.steps})
        self._measure(reply, message, model, data, report)
        return self._send(message, partition, reply)

    def fit(
        self, model: nn.Module, data: Examples, settings: LocalTraining, *, seed: int, client: int, round: int
    ) -> TrainingReport:
        """Train one client's model in place, and leave in it what the client sends."""
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        base = {} if self.tamper is None else {name: p.clone() for name, p in parameters.items()}
        report = train(model, data, None, settings, seed=seed, client=client, round=round, task=self.task)
        if self.tamper is not None:
            for name, tensor in self.tamper(parameters, base, client, round).items():
                parameters[name].copy_(tensor)
        return report

    def settings(self, config: ConfigRecord) -> tuple[LocalTraining, int, int]:
        """How to train under a message's configuration, and the seed and round of its batches."""
        # Stages of one round draw their batches apart.
        round = _integer(config, "server-round", 0) + _integer(config, "stage", 0) * _STAGES
        return told_training(self.training, config, alone=not self.mods), _integer(config, "seed", 0), round

    def own_model(self, config: ConfigRecord, partition: int) -> nn.Module | None:
        """What a client starts from instead of the model sent, where clients start apart."""
        if self.own_model_fn is None or not self.starts_apart(config):
            return None
        return self.own_model_fn(partition).to(choose_device(self.device))

    def starts_apart(self, config: ConfigRecord) -> bool:
        """Whether clients start from models of their own."""
        first = _integer(config, "server-round", 0) <= 1 and not _integer(config, "stage", 0)
        return self.own_model_fn is not None and first

    def evaluate(self, message: Message, context: Context) -> Message:
        """Judge the model sent on the held-out examples."""
        model, _ = self._receive(message, context)
        partition, data = self._data(context)
        found = Judged()
        if len(data.held_out):
            with self._told(model):
                found = judge(model, data.held_out, what=f"client {partition}", task=self.task)
        # Of several labels each counts, so that means over clients are means over all labels.
        metrics = MetricRecord({"num-examples": found.labels, "eval_loss": found.loss})
        if found.hits is not None:  # numbers are not right or wrong
            metrics["eval_acc"] = found.accuracy
        return self._send(message, partition, RecordDict({"metrics": metrics}))

    def query(self, message: Message, context: Context) -> Message:
        """Measure the model sent."""
        model, _ = self._receive(message, context)
        partition, data = self._data(context)
        reply = RecordDict({"metrics": MetricRecord({"num-examples": len(data)})})
        with self._told(model):
            self._measure(reply, message, model, data, None)
        return self._send(message, partition, reply)

    def questions(self, message: Message, context: Context) -> Message:
        """Judge models, and measure sums at them, that a merge goes through."""
        partition, data = self._data(context)
        device = next(self.template.parameters()).device
        loader = batches_to_measure(data.train, device)
        generator = self._noise(message, partition)
        reply = answer_questions(message, context, self.template, loader, generator, self.task)
        return self._send(message, partition, reply)

    def _noise(self, message: Message, partition: int) -> torch.Generator | None:
        """Another stream for every message, for the difference of two sums with the same noise has none."""
        if self.noise_seed is None:
            return None
        config = next(iter(message.content.config_records.values()), ConfigRecord())
        numbers = _integer(config, "server-round", 0), _integer(config, "exchange", 0)
        return torch_generator(self.noise_seed, "noise", partition, *numbers)

    def partition(self, message: Message, context: Context) -> Message:
        """Tell which partition this node holds."""
        partition, _ = _node(context)
        return self._send(message, partition, RecordDict())

    def _receive(
        self, message: Message, context: Context, state: State | None = None
    ) -> tuple[nn.Module, ConfigRecord]:
        """The model as it was sent, unless it is known, and the message's configuration."""
        arrays = next(iter(message.content.array_records.values()), None)
        if arrays is None:
            raise ModelError(f"the {message.metadata.message_type} message brings no ArrayRecord with a model")
        config = next(iter(message.content.config_records.values()), ConfigRecord())
        if state is None:
            try:
                state = view_arrays(arrays)
            except (RuntimeError, TypeError, ValueError) as error:
                raise ModelError(f"the model sent cannot be decoded: {error}") from error
        if config.get("batch-norm") == "local" and _LOCAL_BUFFERS in context.state:
            state = {**state, **from_arrays(context.state.array_records[_LOCAL_BUFFERS])}
        try:
            return self._fitted(state), config
        except (ModelError, RuntimeError) as error:
            raise self._misfit(error) from error

    def _misfit(self, error: Exception) -> ModelError:
        kind = type(self.template).__name__
        return ModelError(f"the model sent does not fit the {kind} that model_fn makes: {error}")

    def resized(self, state: State) -> nn.Module:
        """A model of its own with these tensors, at their widths.

        Raises
        ------
        ModelError
            They are of another architecture.
        """
        try:
            return resize(self.template, state)
        except (ModelError, RuntimeError) as error:
            raise self._misfit(error) from error

    def check_outputs(self, model: nn.Module, data: Examples) -> None:
        """Make sure that the model sent goes with this client's own, see :func:`check_outputs`."""
        check_outputs(model, self.template, data)

    def _fitted(self, state: State) -> nn.Module:
        """A model with these tensors; at its usual widths always the same one, which no message keeps."""
        shapes = {name: tensor.shape for name, tensor in state.items()}
        module, fresh = self._working
        # What a client before has left in it, in buffers that do not travel or in attributes, is none of this one's.
        fresh.restore(parameters=False)
        tensors = module.state_dict()
        if self.own_model_fn is not None or shapes != {n: t.shape for n, t in tensors.items()}:
            return resize(self.template, state)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(state[name])
        for parameter, original in zip(module.parameters(), self.template.parameters(), strict=True):
            parameter.requires_grad_(original.requires_grad).grad = None
        return module

    @contextmanager
    def _told(self, model: nn.Module) -> Iterator[None]:
        """Say what is wrong where a model of other widths than usual, which a message brought, does not run."""
        try:
            yield
        except (IndexError, RuntimeError, ValueError) as error:
            if model is self._working[0]:
                raise
            raise ModelError(f"the widths of the model sent do not go with this client's examples: {error}") from error

    @cached_property
    def _working(self) -> tuple[nn.Module, ModelSnapshot]:
        module = copy_of(self.template)
        return module, ModelSnapshot(module)

    def _data(self, context: Context) -> tuple[int, ClientData]:
        partition, total = _node(context)
        return partition, client_data(self.data_fn, partition, total)

    def _measure(
        self, reply: RecordDict, message: Message, model: nn.Module, data: ClientData, report: TrainingReport | None
    ) -> None:
        loader = batches_to_measure(data.train, next(model.parameters()).device)
        add_statistics(reply, message, model, loader, report, task=self.task)

    @staticmethod
    def _send(message: Message, partition: int, reply: RecordDict) -> Message:
        reply[CLIENT_KEY] = ConfigRecord({PARTITION_KEY: partition})
        return Message(reply, reply_to=message)


def _node(context: Context) -> tuple[int, int]:
    """Which partition this node holds, of how many."""
    try:
        return int(context.node_config[PARTITION_KEY]), int(context.node_config["num-partitions"])
    except KeyError as error:
        raise ConfigError(
            f"node configuration lacks {error}: start the SuperNode with "
            '--node-config "partition-id=0 num-partitions=2"'
        ) from error


def _integer(config: ConfigRecord, key: str, default: int) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"the message's {key!r} must be an integer of at least 0, got {value!r}")
    return value
