"""Questions about a merged model as messages: put by the server, answered by clients."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import nn

from fedmerge.errors import ConfigError, FedMergeError, ModelError, shown
from fedmerge.models.resize import resize
from fedmerge.questions import Answer, Question, respond
from fedmerge.state import State
from fedmerge.statistics import Batches
from fedmerge.strategies.question_records import (
    EXAMPLES_KEY,
    METRICS,
    OCCASION,
    OF,
    read_answers,
    read_question,
    write_answer,
    write_question,
)
from fedmerge.strategies.reach import Reach
from fedmerge.strategies.stages import own_model
from fedmerge.strategies.wire import from_arrays, to_arrays
from fedmerge.tasks import Task

__all__ = ["ACTION", "answer_questions", "ask"]

log = logging.getLogger("fedmerge")

ACTION = "questions"
"""Of the query messages."""
_OWN = "own"


def ask(
    reach: Reach, numbers: Iterator[int], questions: Sequence[Question], clients: Sequence[int]
) -> list[tuple[int, list[Answer]]]:
    """Put questions to clients and collect their answers, in order of clients.

    Parameters
    ----------
    reach
        How to reach clients, and what every message says besides.
    numbers
        Counts the exchanges.
    questions, clients
        See :data:`~fedmerge.questions.Ask`.
    """
    content = RecordDict()
    content["config"] = ConfigRecord({**reach.config, "questions": len(questions), "exchange": next(numbers)})
    for number, question in enumerate(questions):
        write_question(content, number, question)
    messages = {
        client: Message(
            _brought(content, questions, client), message_type=f"query.{ACTION}", dst_node_id=reach.node_of(client)
        )
        for client in clients
    }
    found: dict[int, list[Answer]] = {}
    for client, reply in reach.send(messages, "questions", lambda one: not _answers(one, content)).items():
        try:
            found[client] = read_answers(reply.content, questions)
        except (FedMergeError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            log.warning("client %d: its answer cannot be read and is left out (%s)", client, shown(error, 500))
    return sorted(found.items())


def _answers(reply: Message, content: RecordDict) -> bool:
    """Whether a reply, where it is no error, says that it is to these questions: one to an attempt before may bring the
    same records."""
    if not reply.has_content():
        return True
    told, asked = reply.content.config_records.get(OF, ConfigRecord()), content.config_records["config"]
    return all(told.get(key) == asked.get(key) for key in OCCASION)


def _brought(content: RecordDict, questions: Sequence[Question], client: int) -> RecordDict:
    """The message of one client: where its neurons were moved, its own model comes with it as it is now."""
    own = next((question.own[client] for question in questions if client in question.own), None)
    return content if own is None else RecordDict({**content, _OWN: to_arrays(own)})


def answer_questions(
    message: Message,
    context: Context,
    template: nn.Module,
    batches: Batches,
    generator: torch.Generator | None = None,
    task: Task | None = None,
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

    Raises
    ------
    ModelError, ConfigError
        The message cannot be read, or is about another model.
    """
    told = next(iter(message.content.config_records.values()), ConfigRecord())
    count = told.get("questions")
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"the message brings {count!r} questions")
    reply = RecordDict()
    examples = 0
    for number in range(count):
        try:
            question = read_question(message.content, number)
            own = resize(template, _own(message, context)) if question.compares else None
            found = respond(question, template, batches, generator, own, task)
        except (KeyError, IndexError) as error:
            raise ModelError(f"question {number} of the message is not complete: {error} is missing") from error
        except RuntimeError as error:
            raise ModelError(f"question {number} is about another model than the client's: {error}") from error
        write_answer(reply, number, found)
        examples = found.judged + found.examples
    reply[METRICS] = MetricRecord({EXAMPLES_KEY: examples})
    reply[OF] = ConfigRecord({key: told[key] for key in OCCASION if key in told})
    return reply


def _own(message: Message, context: Context) -> State:
    """The model that the client trained: as the message brings it, or else as it was kept."""
    brought = message.content.array_records.get(_OWN)
    return own_model(context) if brought is None else from_arrays(brought)
