"""Questions about a merged model as messages: put by the server, answered by clients."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import get_args

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedmerge.errors import ConfigError, FedMergeError, ModelError, NoAnswer
from fedmerge.questions import Answer, Question, respond
from fedmerge.statistics import Batches, statistic
from fedmerge.statistics.compression import Compression
from fedmerge.statistics.settings import to_settings
from fedmerge.strategies.failures import answered
from fedmerge.strategies.measure import strings
from fedmerge.strategies.wire import from_arrays, statistics_records, to_arrays, view_arrays

__all__ = ["ACTION", "answer_questions", "ask"]

log = logging.getLogger("fedmerge")

ACTION = "questions"
"""Of the query messages."""
_BASE = -1  # where nothing is measured at a point
_LOSSES = "losses"
_MOST_POINTS = 1000


def ask(
    grid: Grid | None,
    config: Mapping[str, int],
    nodes: Mapping[int, int],
    questions: Sequence[Question],
    clients: Sequence[int],
    *,
    timeout: float | None = None,
) -> list[tuple[int, list[Answer]]]:
    """Put questions to clients and collect their answers, in order of clients.

    Parameters
    ----------
    grid
        How to reach nodes.
    config
        What every message says besides.
    nodes
        The node of each client.
    questions, clients
        See :data:`~fedmerge.questions.Ask`.
    timeout
        Seconds to wait for replies.
    """
    if grid is None:
        raise NoAnswer("aggregate_train before configure_train: there is no grid to reach clients by")
    content = RecordDict({"config": ConfigRecord({**config, "questions": len(questions)})})
    for number, question in enumerate(questions):
        for key, record in _written(question).items():
            content[f"{number}.{key}"] = record
    numbers = {nodes[client]: client for client in clients}
    messages = [Message(content, message_type=f"query.{ACTION}", dst_node_id=node) for node in numbers]
    found: dict[int, list[Answer]] = {}
    for reply in answered(grid.send_and_receive(messages, timeout=timeout)):
        client = numbers.get(reply.metadata.src_node_id)
        if client is None or client in found:
            continue
        try:
            found[client] = [_answer(reply.content, number) for number in range(len(questions))]
        except (FedMergeError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            log.warning("client %d: its answer cannot be read and is left out (%s)", client, error)
    return sorted(found.items())


def answer_questions(message: Message, template: nn.Module, batches: Batches) -> RecordDict:
    """A client's reply.

    Raises
    ------
    ModelError, ConfigError
        The message cannot be read, or is about another model.
    """
    count = next(iter(message.content.config_records.values()), ConfigRecord()).get("questions")
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"the message brings {count!r} questions")
    reply = RecordDict()
    examples = 0
    for number in range(count):
        try:
            found = respond(_read(message.content, number), template, batches)
        except (KeyError, IndexError) as error:
            raise ModelError(f"question {number} of the message is not complete: {error} is missing") from error
        except RuntimeError as error:
            raise ModelError(f"question {number} is about another model than the client's: {error}") from error
        reply[f"{number}.{_LOSSES}"] = to_arrays({_LOSSES: found.losses})
        reply[f"{number}.counts"] = ConfigRecord({"judged": found.judged, "examples": found.examples})
        for key, record in statistics_records(found.statistics).items():
            reply[f"{number}.{key}"] = record
        examples = found.judged + found.examples
    reply["metrics"] = MetricRecord({"num-examples": examples})
    return reply


def _written(question: Question) -> dict[str, ArrayRecord | ConfigRecord]:
    records: dict[str, ArrayRecord | ConfigRecord] = {"base": to_arrays(question.base)}
    for i, direction in enumerate(question.directions):
        records[f"direction.{i}"] = to_arrays({name: step.to(question.base[name]) for name, step in direction.items()})
    records["question"] = ConfigRecord(
        {
            "directions": len(question.directions),
            "points": [float(factor) for point in question.points for factor in point],
            "number-of-points": len(question.points),
            "at": _BASE if question.at is None else question.at,
            "needs": [kind.name for kind in question.needs],
            "needs-settings": [to_settings(kind) for kind in question.needs],
            "holdout": question.holdout,
            "compression": question.compression,
            "budget": float(question.budget),
        }
    )
    return records


def _read(content: RecordDict, number: int) -> Question:
    told = content.config_records[f"{number}.question"]
    count, points, at, holdout = (_whole(told, key) for key in ("directions", "number-of-points", "at", "holdout"))
    flat, compression, budget = told["points"], told["compression"], told["budget"]
    if not isinstance(flat, list) or len(flat) != count * points or points > _MOST_POINTS or not _BASE <= at < points:
        raise ConfigError(f"question {number} has {points} points around {count} directions, and measures at {at}")
    if compression not in get_args(Compression) or not isinstance(budget, int | float) or holdout < 2:
        raise ConfigError(f"question {number}: compression {compression!r}, budget {budget!r}, holdout {holdout!r}")
    chosen: Compression = compression  # type: ignore[assignment]
    names, settings = strings(told, "needs"), strings(told, "needs-settings")
    arrays = content.array_records
    return Question(
        base=view_arrays(arrays[f"{number}.base"]),
        directions=tuple(from_arrays(arrays[f"{number}.direction.{i}"]) for i in range(count)),
        points=tuple(tuple(float(f) for f in flat[i * count : (i + 1) * count]) for i in range(points)),
        at=None if at == _BASE else at,
        needs=tuple(statistic(n, s) for n, s in zip_longest(names, settings, fillvalue="{}")),
        holdout=holdout,
        compression=chosen,
        budget=float(budget),
    )


def _whole(told: ConfigRecord, key: str) -> int:
    value = told[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"the question's {key!r} must be a whole number, got {value!r}")
    return value


def _answer(content: RecordDict, number: int) -> Answer:
    losses: Tensor = view_arrays(content.array_records[f"{number}.{_LOSSES}"])[_LOSSES]
    counts = content.config_records[f"{number}.counts"]
    prefix = f"{number}.statistics."
    statistics = {
        key[len(prefix) :]: view_arrays(record)
        for key, record in content.array_records.items()
        if key.startswith(prefix)
    }
    return Answer(losses.to(torch.float64), _whole(counts, "judged"), _whole(counts, "examples"), statistics)
