"""Every kind of hostile client by its name: what it makes of the honest thing that it would have sent.

A table a place where a client can lie: ``STATES`` (its model), ``WEIGHTS`` (how many examples it claims), ``METRICS``,
``STATISTICS``, ``ANSWERS`` (to questions about a merged model) and ``IDENTITY`` (who it says that it is). An entry is
called as ``kind(rng, honest, about)`` and gives the hostile thing, or None where there is nothing of the kind to spoil;
what is honest stays as it was. ``kinds(table)`` are Hypothesis strategies over entries, for any of these tables.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from flwr.app import MetricRecord, RecordDict
from hypothesis import strategies as st

from fedmerge import ClientUpdate
from fedmerge.state import State
from fedmerge.wire.record_values import from_arrays, to_arrays
from tests.hostile.answer_kinds import ANSWERS
from tests.hostile.identity_kinds import IDENTITY
from tests.hostile.kind import Kind, Table
from tests.hostile.state_kinds import STATES
from tests.hostile.statistic_kinds import STATISTICS, spoilt_statistic
from tests.hostile.told_kinds import METRICS, WEIGHTS

__all__ = ["ANSWERS", "IDENTITY", "METRICS", "STATES", "STATISTICS", "WEIGHTS", "Kind", "hostile_reply",
           "hostile_update", "kinds", "replies_of", "updates_of"]  # fmt: skip

_STATISTIC = "statistics."


def kinds(*tables: Table) -> st.SearchStrategy[Kind]:
    """Any entry of these tables."""
    return st.sampled_from([kind for table in tables for kind in table.values()])


def draws() -> st.SearchStrategy[random.Random]:
    """What an entry draws by: Hypothesis makes each draw, and shrinks it to the first of what there is."""
    return st.randoms(use_true_random=False)


def hostile_update(kind: Kind, rng: random.Random, update: ClientUpdate, model: State) -> ClientUpdate | None:
    """An update whose state, weight or statistics are of this kind, the rest honest; None where the kind says nothing.

    `model` is what all clients started from.
    """
    if kind.place == "state":
        state = kind(rng, update.state, model)
        return None if state is None else replace(update, state=state)
    if kind.place == "weight":
        return replace(update, weight=kind(rng, update.weight, None))
    if kind.place == "statistic":
        found = spoilt_statistic(kind, rng, update.statistics)
        return None if found is None else replace(update, statistics=found)
    return None


def hostile_reply(kind: Kind, rng: random.Random, content: RecordDict, model: State) -> RecordDict | None:
    """The same for a reply to a training message, in a deployment or a simulation; metrics as well."""
    records = RecordDict(dict(content.items()))
    if kind.place == "state":
        key = next(key for key in content.array_records if not key.startswith(_STATISTIC))
        state = kind(rng, from_arrays(content.array_records[key]), model)
        if state is None:
            return None
        records[key] = to_arrays(state)
        return records
    if kind.place in ("weight", "metrics"):
        key = next(iter(content.metric_records))
        honest = dict(content.metric_records[key])
        if kind.place == "weight":
            told: Any = {**honest, "num-examples": kind(rng, honest["num-examples"], None)}
        else:
            told = kind(rng, honest, None)
        del records[key]
        if told is not None:
            records[key] = MetricRecord(told)
        return records
    if kind.place == "statistic":
        names = [key for key in content.array_records if key.startswith(_STATISTIC)]
        measured = {key.removeprefix(_STATISTIC): from_arrays(content.array_records[key]) for key in names}
        found = spoilt_statistic(kind, rng, measured)
        if found is None:
            return None
        for key in names:
            del records[key]
        for name, value in found.items():
            records[_STATISTIC + name] = to_arrays(value)
        if "local_steps" in measured:  # which else would be told among the metrics
            key = next(iter(content.metric_records))
            told = content.metric_records[key].items()
            records[key] = MetricRecord({k: v for k, v in told if k not in ("local-steps", "momentum")})
        return records
    return None


def updates_of(update: ClientUpdate, model: State, *tables: Table) -> st.SearchStrategy[tuple[Kind, ClientUpdate]]:
    """Hostile versions of an honest update, each with its kind."""
    drawn = st.builds(lambda kind, rng: (kind, hostile_update(kind, rng, update, model)), kinds(*tables), draws())
    return drawn.filter(lambda pair: pair[1] is not None)


def replies_of(content: RecordDict, model: State, *tables: Table) -> st.SearchStrategy[tuple[Kind, RecordDict]]:
    """Hostile versions of an honest reply, each with its kind."""
    drawn = st.builds(lambda kind, rng: (kind, hostile_reply(kind, rng, content, model)), kinds(*tables), draws())
    return drawn.filter(lambda pair: pair[1] is not None)
