"""How a client answers Flower's messages: orders to train, and whatever else it is asked about models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import nn

from fedmerge.clients.client import Client, receive, sent_model
from fedmerge.clients.kept_in_context import kept_buffers, own_model
from fedmerge.clients.measure import add_statistics
from fedmerge.clients.road import enter, metrics_of, run
from fedmerge.data.client_data import ClientData, client_data
from fedmerge.errors import ConfigError, ModelError
from fedmerge.models.resize import resize
from fedmerge.questions import respond
from fedmerge.routing import RoutedModel, Routing
from fedmerge.seeding import torch_generator
from fedmerge.state import State
from fedmerge.statistics import Batches
from fedmerge.tasks import Task
from fedmerge.training.judged import Judged, judge
from fedmerge.training.local import batches_to_measure
from fedmerge.wire.flower_records import CLIENT_KEY, PARTITION_KEY
from fedmerge.wire.keys import COMPLETES_KEY, OWN, ROUTING
from fedmerge.wire.metric_sums import written_sums
from fedmerge.wire.question_records import EXAMPLES_KEY, METRICS, OCCASION, OF, read_question, write_answer
from fedmerge.wire.record_values import from_arrays, integer, statistics_records, to_arrays

__all__ = ["Answers", "answer_questions"]


@dataclass(frozen=True)
class Answers:
    """The handlers of a :func:`~fedmerge.clients.client_app`.

    Parameters
    ----------
    client
        The client side of this process.
    """

    client: Client

    def train(self, message: Message, context: Context) -> Message:
        """Train the model sent: the road of one client, from a message to its reply."""
        number, total = _node(context)
        client = self._told(message)
        order = receive(client, message.content)
        gone = run(client, enter(client, order, number, total, context.state, context.node_id))
        reply = RecordDict({"arrays": to_arrays(gone.state()), "metrics": MetricRecord({**metrics_of(gone)})})
        for key, record in statistics_records(gone.statistics[0]).items():
            reply[key] = record
        return _send(message, number, reply, completes=order.parts is not None and order.parts.completes)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Judge the model sent on the held-out examples."""
        client, model = self._told(message), _routed(self._model(message, context), message)
        number, data = self._data(context)
        judged = Judged()
        if len(data.held_out):
            with client.telling(model):
                judged = judge(model, data.held_out, what=f"client {number}", task=self.client.task)
        # Of several labels each counts, so that means over clients are means over all labels.
        metrics = MetricRecord({"num-examples": judged.labels, "eval_loss": judged.loss})
        if judged.hits is not None:  # numbers are not right or wrong
            metrics["eval_acc"] = judged.accuracy
        metrics.update(written_sums(judged.sums))
        return _send(message, number, RecordDict({"metrics": metrics}))

    def query(self, message: Message, context: Context) -> Message:
        """Measure the model sent."""
        client, model = self._told(message), self._model(message, context)
        parts = client.parts(_config(message))
        number, data = self._data(context)
        reply = RecordDict({"metrics": MetricRecord({"num-examples": len(data)})})
        with client.telling(model), nullcontext() if parts is None else parts.measured(model):
            add_statistics(reply, message, model, _loader(data, model), task=self.client.task)
        return _send(message, number, reply)

    def questions(self, message: Message, context: Context) -> Message:
        """Judge models, and measure sums at them, that a merge goes through."""
        number, data = self._data(context)
        client = self._told(message)
        parts = client.parts(_config(message))
        template = client.shared_template(parts)
        loader, noise = _loader(data, template), self._noise(message, number)
        own = {} if parts is None else {"completed": partial(parts.received, kept=context.state)}
        reply = answer_questions(message, context, template, loader, noise, self.client.task, **own)
        return _send(message, number, reply)

    def partition(self, message: Message, context: Context) -> Message:
        """Tell which partition this node holds."""
        return _send(message, _node(context)[0], RecordDict())

    def _told(self, message: Message) -> Client:
        return self.client.told(_config(message))

    def _data(self, context: Context) -> tuple[int, ClientData]:
        number, total = _node(context)
        return number, client_data(self.client.data_fn, number, total)

    def _model(self, message: Message, context: Context) -> nn.Module:
        """The model sent, with what of it does not travel, and the client's own batch norms where they stay with it."""
        state: State = sent_model(message.content, message.metadata.message_type)
        client, config = self._told(message), _config(message)
        parts = client.parts(config)
        state = state if parts is None else parts.received(state, context.state)
        if config.get("batch-norm") == "local":
            state = {**state, **kept_buffers(context.state)}
        return client.fitted(state)

    def _noise(self, message: Message, number: int) -> torch.Generator | None:
        """Another stream for every message, for the difference of two sums with the same noise has none."""
        if self.client.noise_seed is None:
            return None
        config = _config(message)
        occasion = integer(config, "server-round"), integer(config, "exchange")
        return torch_generator(self.client.noise_seed, "noise", number, *occasion)


def _routed(model: nn.Module, message: Message) -> nn.Module:
    """The model with the experts and gates that the message brings, if any."""
    brought = message.content.array_records.get(ROUTING)
    return model if brought is None else RoutedModel(model, Routing.from_tensors(from_arrays(brought)))


def _loader(data: ClientData, model: nn.Module) -> Batches:
    return batches_to_measure(data.train, next(model.parameters()).device)


def _config(message: Message) -> ConfigRecord:
    return next(iter(message.content.config_records.values()), ConfigRecord())


def _send(message: Message, number: int, reply: RecordDict, *, completes: bool = False) -> Message:
    reply[CLIENT_KEY] = ConfigRecord({PARTITION_KEY: number, **({COMPLETES_KEY: True} if completes else {})})
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


def answer_questions(
    message: Message,
    context: Context,
    template: nn.Module,
    batches: Batches,
    generator: torch.Generator | None = None,
    task: Task | None = None,
    completed: Callable[[State], State] = lambda state: state,
) -> RecordDict:
    """A client's reply.

    Parameters
    ----------
    message, context
        What is asked, and what the client keeps.
    template
        A model of the architecture.
    batches
        Of the client's examples.
    generator
        Of noise, see :func:`~fedmerge.questions.respond`.
    task
        What models are to do; read from outputs and targets where not given.
    completed
        Adds to a model's tensors what does not travel.

    Raises
    ------
    ModelError, ConfigError
        The message cannot be read, or is about another model.
    """
    config = _config(message)
    count = config.get("questions")
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"the message brings {count!r} questions")
    reply = RecordDict()
    examples = 0
    for number in range(count):
        try:
            question = read_question(message.content, number)
            question = replace(question, base=completed(question.base))
            own = resize(template, completed(_own(message, context))) if question.compares else None
            answer = respond(question, template, batches, generator, own, task)
        except (KeyError, IndexError) as error:
            raise ModelError(f"question {number} of the message is not complete: {error} is missing") from error
        except RuntimeError as error:
            raise ModelError(f"question {number} is about another model than the client's: {error}") from error
        write_answer(reply, number, answer)
        examples = answer.judged + answer.examples
    reply[METRICS] = MetricRecord({EXAMPLES_KEY: examples})
    reply[OF] = ConfigRecord({key: config[key] for key in OCCASION if key in config})
    return reply


def _own(message: Message, context: Context) -> State:
    """The model that the client trained: as the message brings it, or else as it was kept."""
    brought = message.content.array_records.get(OWN)
    return own_model(context.state) if brought is None else from_arrays(brought)
