"""What runs in Ray's processes: workers that train, and leaders of the workers on one node."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from flwr.app import Context, Message, Metadata, RecordDict
from ray.exceptions import RayError

from fedmerge.simulation.workers.cohort_work import answer, choose
from fedmerge.simulation.workers.flower_task import FIRST_NODE, become_server_task, failure_reason, rebuild
from fedmerge.simulation.workers.ray_pool import Call, Pool
from fedmerge.simulation.workers.ray_tensors import share_tensors
from fedmerge.simulation.workers.workers import Job, divided, handle, serial_pieces, warm_up
from fedmerge.strategies.order import Answer, Order
from fedmerge.training import EngineChoice

__all__ = ["Leader", "Reference", "Worker", "gathered", "remembered", "train_on"]

EngineName = Literal["serial", "stacked"]

Reference = list[Any]
"""A Ray reference in a list, which Ray leaves alone: fetched and unpickled once in a process, not per call. Behind it
stands where to look for modules."""


class Worker:
    """One process that trains clients, one at a time or a cohort."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        become_server_task()
        share_tensors()
        warm_up()
        self._known = _Known()

    def ping(self) -> tuple[str, int]:
        """The node it runs on, and its process."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def handle(
        self, app: Reference, metadata: Metadata, content: RecordDict, context: Context
    ) -> tuple[Message, Context]:
        """Answer one message."""
        outcome = handle(self._known("app", app), Job(rebuild(metadata, content), context))
        return outcome.reply, outcome.context

    def choose(self, app: Reference, order: Reference, nodes: Sequence[int], total: int) -> EngineChoice:
        """Measure which engine is faster."""
        return choose(self._known("app", app).client, self._known("order", order), nodes, total)

    def train(
        self,
        app: Reference,
        order: Reference,
        nodes: Sequence[int],
        total: int,
        engine: EngineName,
        kept: Mapping[int, RecordDict],
    ) -> Answer:
        """Train some clients of an order and fold them."""
        return answer(self._known("app", app).client, self._known("order", order), nodes, total, engine, kept)


class Leader:
    """Has the workers of its own node train, and folds their sums: one sum leaves a node, however many clients."""

    def __init__(self, workers: Sequence[Any]) -> None:
        torch.set_num_threads(1)
        become_server_task()
        share_tensors()
        self._workers, self._pool = list(workers), Pool(workers)
        self._known = _Known()

    def ping(self) -> None:
        """Answer once one of its workers does: a leader that was moved off a lost node may have none for good."""
        ray.wait([worker.ping.remote() for worker in self._workers], num_returns=1)

    def train(
        self,
        app: Reference,
        order: Reference,
        nodes: Sequence[int],
        total: int,
        engine: EngineName,
        limit: float | None,
        kept: Mapping[int, RecordDict],
    ) -> Answer:
        """Train some clients of an order on its workers."""
        return train_on(self._pool, app, order, self._known("order", order), nodes, total, engine, limit, kept)


def train_on(
    pool: Pool,
    app: Reference,
    told: Reference,
    order: Order,
    nodes: Sequence[int],
    total: int,
    engine: EngineName,
    limit: float | None = None,
    kept: Mapping[int, RecordDict] | None = None,
) -> Answer:
    """Divide clients among workers and add up what comes back, in the order of the clients.

    Each may take `limit` seconds; `kept` is what they remember, by node.
    """

    def call(piece: Sequence[int]) -> Call:
        return lambda worker: worker.train.remote(app, told, piece, total, engine, remembered(kept or {}, piece))

    # Stacked clients are cheap, and many: a piece for each worker.
    pieces = serial_pieces(nodes) if engine == "serial" else divided(nodes, len(pool))
    return gathered(pool, pieces, call, order, limit)


def gathered(
    pool: Pool,
    pieces: Sequence[Sequence[int]],
    call: Callable[[Sequence[int]], Call],
    order: Order,
    limit: float | None = None,
) -> Answer:
    """The answers of all `pieces` as one; where one failed for good, its clients are tried one by one."""
    result = Answer()
    limits = None if limit is None else [limit * len(piece) for piece in pieces]
    answers = list(zip(pieces, pool.run([call(piece) for piece in pieces], limits), strict=True))
    for piece, given in answers:
        if isinstance(given, RayError) and len(piece) == 1:
            result.failures += [(node, failure_reason(node - FIRST_NODE, given)) for node in piece]
            continue
        if isinstance(given, RayError):
            found = gathered(pool, [[node] for node in piece], call, order, limit)
        else:
            found = given
            if result.partial is None:  # what the others are added to must be ours: they lie in the object store
                found.partial = copy.deepcopy(found.partial)
        result.extend(found, order.pipeline)
    return result


def remembered(kept: Mapping[int, RecordDict], nodes: Sequence[int]) -> dict[int, RecordDict]:
    """What these nodes remember, of all."""
    return {node: kept[node] for node in nodes if node in kept}


class _Known:
    """What was fetched last of each kind."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Any, Any]] = {}

    def __call__(self, kind: str, reference: Reference) -> Any:
        known = self._values.get(kind)
        if known is None or known[0] != reference[0]:
            _look_in(reference[1])
            known = self._values[kind] = reference[0], ray.get(reference[0])
        return known[1]


def _look_in(entries: Sequence[str]) -> None:
    """Look for modules where the script does, in its order; as far as this machine has the folders."""
    there = [entry for entry in entries if Path(entry).exists()]
    sys.path[:] = [*there, *(entry for entry in sys.path if entry not in there)]
    importlib.invalidate_caches()
