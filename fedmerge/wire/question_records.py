"""Questions about a merged model, and answers to them, as records of messages."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import get_args

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedmerge.errors import ConfigError, shown
from fedmerge.questions import Answer, Question
from fedmerge.statistics import NoisySums, statistic
from fedmerge.statistics.sending.compression import Compression
from fedmerge.statistics.sending.settings import to_settings
from fedmerge.wire.flower_records import CLIENT_KEY, PARTITION_KEY
from fedmerge.wire.record_values import from_arrays, statistics_key, statistics_records, strings, to_arrays, view_arrays

__all__ = [
    "EXAMPLES_KEY",
    "METRICS",
    "OCCASION",
    "OF",
    "read_answers",
    "read_question",
    "write_answer",
    "write_question",
]

METRICS, EXAMPLES_KEY = "metrics", "num-examples"
"""What a reply tells besides its answers."""
OF, OCCASION = "occasion", ("server-round", "exchange")
"""A record in which a reply repeats which exchange of which round it is to."""

_BASE = -1  # where nothing is measured at a point
_LOSSES, _COUNTS = "losses", "counts"
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
    config = content.config_records[f"{number}.question"]
    count, points, at, holdout = (_whole(config, key) for key in ("directions", "number-of-points", "at", "holdout"))
    flat, compression, budget = config["points"], config["compression"], config["budget"]
    if not isinstance(flat, list) or len(flat) != count * points or points > _MOST_POINTS or not _BASE <= at < points:
        raise ConfigError(f"question {number} has {points} points around {count} directions, and measures at {at}")
    if compression not in get_args(Compression) or not isinstance(budget, int | float) or holdout < 0:
        raise ConfigError(f"question {number}: compression {compression!r}, budget {budget!r}, holdout {holdout!r}")
    chosen: Compression = compression  # type: ignore[assignment]
    names, settings = strings(config, "needs"), strings(config, "needs-settings")
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
        noise=_read_noise(config),
    )


def _whole(config: ConfigRecord, key: str) -> int:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"the question's {key!r} must be a whole number, got {value!r}")
    return value


def _noise_text(noise: NoisySums | None) -> str:
    return "" if noise is None else json.dumps(dataclasses.asdict(noise))


def _read_noise(config: ConfigRecord) -> NoisySums | None:
    """Whoever does not understand what noise is wanted must not answer without."""
    text = config.get("noise", "")
    try:
        return NoisySums(**json.loads(str(text))) if text else None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the noise {text!r} cannot be read: {error}") from error


def write_answer(reply: RecordDict, number: int, answer: Answer) -> None:
    """Add the answer to the question of that number to a reply."""
    reply[f"{number}.{_LOSSES}"] = to_arrays({_LOSSES: answer.losses})
    reply[f"{number}.{_COUNTS}"] = ConfigRecord(
        {"judged": answer.judged, "examples": answer.examples, "noise": _noise_text(answer.noise)}
    )
    for key, record in statistics_records(answer.statistics).items():
        reply[f"{number}.{key}"] = record


def read_answers(content: RecordDict, questions: Sequence[Question]) -> list[Answer]:
    """The answers to all questions of an exchange, as a client gave them, which has to be all of them and nothing more.

    Raises
    ------
    FedMergeError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError
        What comes from a client may be anything.
    """
    wanted: dict[str, set[str] | None] = {METRICS: {EXAMPLES_KEY}, CLIENT_KEY: {PARTITION_KEY}, OF: set(OCCASION)}
    for number, question in enumerate(questions):
        wanted |= {f"{number}.{_LOSSES}": {_LOSSES}, f"{number}.{_COUNTS}": {"judged", "examples", "noise"}}
        wanted |= dict.fromkeys(f"{number}.{statistics_key(kind.name)}" for kind in question.needs)
    for key, record in content.items():
        if key not in wanted:
            raise ConfigError(f"it brings {shown(key)}, for which nobody asked")
        more = set(record) - (wanted[key] or set(record))
        if more or (isinstance(record, MetricRecord) and not isinstance(record[EXAMPLES_KEY], int | float)):
            raise ConfigError(f"its {key!r} brings {shown(sorted(more)[:5])}, for which nobody asked")
    return [_read_answer(content, number, question) for number, question in enumerate(questions)]


def _read_answer(content: RecordDict, number: int, question: Question) -> Answer:
    losses: Tensor = view_arrays(content.array_records[f"{number}.{_LOSSES}"])[_LOSSES]
    counts, arrays = content.config_records[f"{number}.{_COUNTS}"], content.array_records
    keys = {kind.name: f"{number}.{statistics_key(kind.name)}" for kind in question.needs}
    statistics = {name: view_arrays(arrays[key]) for name, key in keys.items() if key in arrays}
    judged, examples, noise = _whole(counts, "judged"), _whole(counts, "examples"), counts.get("noise", "")
    known = question.noise is not None and noise == _noise_text(question.noise)
    return Answer(losses, judged, examples, statistics, noise=question.noise if known else _read_noise(counts))
