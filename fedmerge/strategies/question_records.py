"""Questions about a merged model, and answers to them, as records of messages."""

from __future__ import annotations

import dataclasses
import json
from itertools import zip_longest
from typing import get_args

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedmerge.errors import ConfigError
from fedmerge.questions import Answer, Question
from fedmerge.statistics import NoisySums, statistic
from fedmerge.statistics.compression import Compression
from fedmerge.statistics.settings import to_settings
from fedmerge.strategies.measure import strings
from fedmerge.strategies.wire import from_arrays, statistics_records, to_arrays, view_arrays

__all__ = ["read_answer", "read_question", "write_answer", "write_question"]

_BASE = -1  # where nothing is measured at a point
_LOSSES = "losses"
_MOST_POINTS = 1000


def write_question(content: RecordDict, number: int, question: Question) -> None:
    """Add a question to a message."""
    for key, record in _written(question).items():
        content[f"{number}.{key}"] = record


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
            "noise": _noise_text(question.noise),
        }
    )
    return records


def read_question(content: RecordDict, number: int) -> Question:
    """The question of that number in a message.

    Raises
    ------
    ConfigError
        It makes no sense.
    LookupError
        A part of it is missing.
    """
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
        noise=_read_noise(told),
    )


def _whole(told: ConfigRecord, key: str) -> int:
    value = told[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"the question's {key!r} must be a whole number, got {value!r}")
    return value


def _noise_text(noise: NoisySums | None) -> str:
    return "" if noise is None else json.dumps(dataclasses.asdict(noise))


def _read_noise(told: ConfigRecord) -> NoisySums | None:
    """Whoever does not understand what noise is wanted must not answer without."""
    text = told.get("noise", "")
    try:
        return NoisySums(**json.loads(str(text))) if text else None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the noise {text!r} cannot be read: {error}") from error


def write_answer(reply: RecordDict, number: int, answer: Answer) -> None:
    """Add the answer to the question of that number to a reply."""
    reply[f"{number}.{_LOSSES}"] = to_arrays({_LOSSES: answer.losses})
    reply[f"{number}.counts"] = ConfigRecord(
        {"judged": answer.judged, "examples": answer.examples, "noise": _noise_text(answer.noise)}
    )
    for key, record in statistics_records(answer.statistics).items():
        reply[f"{number}.{key}"] = record


def read_answer(content: RecordDict, number: int) -> Answer:
    """The answer to the question of that number, as a client gave it.

    Raises
    ------
    FedMergeError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError
        What comes from a client may be anything.
    """
    losses: Tensor = view_arrays(content.array_records[f"{number}.{_LOSSES}"])[_LOSSES]
    counts = content.config_records[f"{number}.counts"]
    prefix = f"{number}.statistics."
    statistics = {
        key[len(prefix) :]: view_arrays(record)
        for key, record in content.array_records.items()
        if key.startswith(prefix)
    }
    judged, examples = _whole(counts, "judged"), _whole(counts, "examples")
    return Answer(losses.to(torch.float64), judged, examples, statistics, noise=_read_noise(counts))
