"""The client side: a Flower ClientApp that trains, evaluates and measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedmerge.data.client_data import ClientData
from fedmerge.errors import ConfigError, InvalidOption, ModelError
from fedmerge.models.resize import resize
from fedmerge.state import State
from fedmerge.strategies.measure import add_statistics, strings
from fedmerge.strategies.stages import keep, kept_model
from fedmerge.strategies.wire import CLIENT_KEY, PARTITION_KEY, STEPS_KEY, from_arrays, to_arrays
from fedmerge.training.device import choose_device
from fedmerge.training.local import LocalTraining, batches, evaluate, train
from fedmerge.training.report import TrainingReport

__all__ = ["client_app"]

_LOCAL_BUFFERS = "fedmerge.buffers"
_STAGES = 1 << 20  # more than there are rounds


def client_app(
    model_fn: Callable[[], nn.Module],
    data_fn: Callable[[int, int], ClientData],
    *,
    training: LocalTraining | None = None,
    device: str = "auto",
    own_model_fn: Callable[[int], nn.Module] | None = None,
) -> ClientApp:
    """Make a Flower ClientApp that answers every message of our strategies, and those of stock ones.

    It trains on ``train``, judges the model on the client's held-out examples on ``evaluate``, and measures
    statistics of the model it is sent on ``query`` (``query.statistics``); ``query.partition`` asks only which
    partition it holds. To a strategy that asks for no
    statistics it replies just as any ClientApp: one ArrayRecord, one MetricRecord with ``num-examples``.

    Parameters
    ----------
    model_fn
        Makes the model; its initial values do not matter, for every message brings them.
    data_fn
        ``data_fn(partition_id, num_partitions)`` gives the client's examples.
    training
        How to train; a message's ConfigRecord overrides its fields, with ``-`` for ``_``
        (``proximal-mu``, as Flower's FedProx sends it).
    device
        ``"auto"`` takes a GPU where the process has one.
    own_model_fn
        ``own_model_fn(partition_id)`` makes the model that a client starts the first round from instead of the one
        sent, at a width of its own where the method can merge that. Models may then be wider than `model_fn` says:
        what a message brings decides.

    Returns
    -------
    ClientApp
        Metrics of its replies: ``num-examples``, ``train_loss``, ``local-steps``; ``eval_loss``, ``eval_acc``.

    Examples
    --------
    >>> import torch
    >>> rows = torch.randn(10, 4), torch.zeros(10, dtype=torch.long)
    >>> app = client_app(lambda: nn.Linear(4, 2), lambda partition, total: ClientData(*rows, *rows))
    >>> type(app).__name__
    'ClientApp'
    """
    client = _Client(model_fn, data_fn, training or LocalTraining(), device, own_model_fn)
    app = ClientApp()
    app.train()(client.train)
    app.evaluate()(client.evaluate)
    app.query()(client.query)
    app.query("statistics")(client.query)
    app.query("partition")(client.partition)
    return app


@dataclass
class _Client:
    """The three handlers; holds nothing of any one client, for a process serves many."""

    model_fn: Callable[[], nn.Module]
    data_fn: Callable[[int, int], ClientData]
    training: LocalTraining
    device: str
    own_model_fn: Callable[[int], nn.Module] | None

    @cached_property
    def _template(self) -> nn.Module:
        return self.model_fn().to(choose_device(self.device))

    def train(self, message: Message, context: Context) -> Message:
        partition, data = self._data(context)
        config = next(iter(message.content.config_records.values()), ConfigRecord())
        stage = _integer(config, "stage", 0)
        state = kept_model(message, context) if stage else None
        model, config = self._receive(message, context, state)
        if self.own_model_fn is not None and _integer(config, "server-round", 0) <= 1 and not stage:
            model = self.own_model_fn(partition).to(choose_device(self.device))
        frozen = strings(config, "frozen")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        settings = _overridden(self.training, config)
        report = train(
            model,
            data.train_x,
            data.train_y,
            settings,
            seed=_integer(config, "seed", 0),
            client=partition,
            # Stages of one round draw their batches apart.
            round=_integer(config, "server-round", 0) + stage * _STAGES,
        )
        if config.get("batch-norm") == "local":
            buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
            context.state[_LOCAL_BUFFERS] = to_arrays(buffers)
        keep(context, config, model)
        wanted = strings(config, "send")
        sent = {n: t for n, t in model.state_dict().items() if not stage or n in wanted}
        reply = RecordDict({"arrays": to_arrays(sent)})
        reply["metrics"] = MetricRecord(
            {"num-examples": len(data.train_x), "train_loss": report.loss, STEPS_KEY: report.steps}
        )
        self._measure(reply, message, model, data, report)
        return self._send(message, partition, reply)

    def evaluate(self, message: Message, context: Context) -> Message:
        model, _ = self._receive(message, context)
        partition, data = self._data(context)
        examples = len(data.held_out_x)
        loss, accuracy = evaluate(model, data.held_out_x, data.held_out_y) if examples else (0.0, 0.0)
        metrics = MetricRecord({"num-examples": examples, "eval_loss": loss, "eval_acc": accuracy})
        return self._send(message, partition, RecordDict({"metrics": metrics}))

    def query(self, message: Message, context: Context) -> Message:
        model, _ = self._receive(message, context)
        partition, data = self._data(context)
        reply = RecordDict({"metrics": MetricRecord({"num-examples": len(data.train_x)})})
        self._measure(reply, message, model, data, None)
        return self._send(message, partition, reply)

    def partition(self, message: Message, context: Context) -> Message:
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
            state = from_arrays(arrays)
        if config.get("batch-norm") == "local" and _LOCAL_BUFFERS in context.state:
            state = {**state, **from_arrays(context.state.array_records[_LOCAL_BUFFERS])}
        try:
            return resize(self._template, state), config
        except (ModelError, RuntimeError) as error:
            kind = type(self._template).__name__
            raise ModelError(f"the model sent does not fit the {kind} that model_fn makes: {error}") from error

    def _data(self, context: Context) -> tuple[int, ClientData]:
        partition, total = _node(context)
        return partition, self.data_fn(partition, total)

    @staticmethod
    def _measure(
        reply: RecordDict, message: Message, model: nn.Module, data: ClientData, report: TrainingReport | None
    ) -> None:
        # A list, for every statistic reads it from the start; its tensors are views of the client's own.
        loader = list(batches(data.train_x, data.train_y, device=next(model.parameters()).device))
        add_statistics(reply, message, model, loader, report)

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


def _overridden(training: LocalTraining, config: ConfigRecord) -> LocalTraining:
    """`training` with the fields that the message sets."""
    fields = {field.name: field for field in dataclasses.fields(LocalTraining)}
    given = {key.replace("-", "_"): value for key, value in config.items()}
    changes: dict[str, Any] = {name: value for name, value in given.items() if name in fields}
    if "epochs" in changes:
        changes.setdefault("steps", None)  # a number of steps would contradict it
    try:
        return dataclasses.replace(training, **changes)
    except TypeError as error:
        raise InvalidOption(f"the message's training settings {changes} have a wrong type: {error}") from error


def _integer(config: ConfigRecord, key: str, default: int) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"the message's {key!r} must be an integer, got {value!r}")
    return value
