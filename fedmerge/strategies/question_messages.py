"""Questions about a merged model as messages, put by the server; clients answer in :mod:`fedmerge.clients.answers`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from flwr.app import ConfigRecord, Message, RecordDict

from fedmerge.errors import FedMergeError, shown
from fedmerge.questions import Answer, Question
from fedmerge.strategies.reach import Reach
from fedmerge.wire.keys import ACTION, OWN
from fedmerge.wire.question_records import OCCASION, OF, read_answers, write_question
from fedmerge.wire.record_values import to_arrays

__all__ = ["ask"]

log = logging.getLogger("fedmerge")


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
        write_question(content, number, replace(question, base=reach.travelling(question.base)))
    messages = {
        client: Message(
            _brought(content, questions, client, reach),
            message_type=f"query.{ACTION}",
            dst_node_id=reach.node_of(client),
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


def _brought(content: RecordDict, questions: Sequence[Question], client: int, reach: Reach) -> RecordDict:
    """The message of one client: where its neurons were moved, its own model comes with it as it is now."""
    own = next((question.own[client] for question in questions if client in question.own), None)
    return content if own is None else RecordDict({**content, OWN: to_arrays(reach.travelling(own))})
