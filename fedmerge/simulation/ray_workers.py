"""Ray actors as workers: processes on this machine, or on the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flwr.app import Context, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp

from fedmerge.errors import ConfigError
from fedmerge.simulation.cohort_work import answer
from fedmerge.simulation.flower_task import FIRST_NODE, become_server_task, error_reply, failure_reason, rebuild
from fedmerge.simulation.workers import Job, Outcome, Workers, handle, warm_up
from fedmerge.strategies.cohort_order import CohortAnswer, CohortOrder

__all__ = ["RayWorkers"]


class RayWorkers(Workers):
    """A pool of Ray actors, each running one client at a time in a process of its own.

    Parameters
    ----------
    count
        Number of actors; None takes one per CPU of the cluster.
    """

    def __init__(self, count: int | None = None) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ConfigError('workers on Ray need ray: pip install "fedmerge[sim]"') from error
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            _start(ray, count)
        cluster = ray.cluster_resources()
        count = count or max(1, int(cluster.get("CPU", 1)))
        gpus = cluster.get("GPU", 0.0) / count
        actor: Any = ray.remote(_Actor).options(
            num_cpus=1,
            num_gpus=min(gpus, 1.0) if gpus else 0,
            # A message is a pure function of its arguments, so a lost actor may simply do it again.
            max_restarts=-1,
            max_task_retries=-1,
        )
        self._actors = [actor.remote() for _ in range(count)]
        self._app: Any = None
        self.shares = 4

    def use(self, app: ClientApp) -> None:
        """Put the app into the object store once; each actor unpickles it at its first message."""
        self._app = self._ray.put(app)

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Give every idle actor the next job; each distinct content travels to the object store once."""
        ray = self._ray
        contents = {id(job.message.content): job.message.content for job in jobs}
        shared = {key: ray.put(content) for key, content in contents.items()}
        calls = (
            (
                lambda actor, job=job: actor.handle.remote(
                    [self._app], job.message.metadata, shared[id(job.message.content)], job.context
                )
            )
            for job in jobs
        )
        for job, reference in zip(jobs, self._in_turn(calls), strict=True):
            yield self._outcome(reference, job)

    def train(self, order: CohortOrder, total: int) -> CohortAnswer:
        """Give every idle actor the next share of the clients; each share comes back as one sum, or its models."""
        told = self._ray.put(order.without_model())
        result = CohortAnswer()
        shares = _shares(order.nodes, self.shares * len(self._actors))
        calls = ((lambda actor, nodes=nodes: actor.train.remote([self._app], [told], nodes, total)) for nodes in shares)
        for nodes, reference in zip(shares, self._in_turn(calls), strict=True):
            try:
                answer = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                answer = CohortAnswer(failures=[(node, failure_reason(node - FIRST_NODE, error)) for node in nodes])
            result.extend(answer, order.pipeline)
        return result

    def _in_turn(self, calls: Iterable[Callable[[Any], Any]]) -> Iterator[Any]:
        """Start each call on the next idle actor; references of finished ones, in the order of `calls`."""
        idle, running, done = list(self._actors), {}, set()
        waiting, started = iter(enumerate(calls)), {}
        position = 0
        while True:
            while idle and (following := next(waiting, None)) is not None:
                number, call = following
                actor = idle.pop()
                started[number] = reference = call(actor)
                running[reference] = number, actor
            while position in done:
                yield started.pop(position)
                position += 1
            if not running:
                return
            ready, _ = self._ray.wait(list(running), num_returns=1)
            number, actor = running.pop(ready[0])
            idle.append(actor)
            done.add(number)

    def close(self) -> None:
        """End the actors, and Ray too if it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._started:
            self._ray.shutdown()

    def _outcome(self, reference: Any, job: Job) -> Outcome:
        try:
            reply, context = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return Outcome(error_reply(job.message, job.context, error), job.context)
        return Outcome(reply, context)


def _start(ray: Any, count: int | None) -> None:
    """Start Ray here, or join the cluster that RAY_ADDRESS names."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its reaction to an exhausted GPU count is about to change; ours is to ask for the share we want.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": count, "include_dashboard": False}
    ray.init(log_to_driver=False, configure_logging=False, **here)


class _Actor:
    """Runs in a Ray process: the app, and one message at a time."""

    def __init__(self) -> None:
        import torch  # noqa: PLC0415 - only the actor sets its threads

        torch.set_num_threads(1)
        become_server_task()
        warm_up()
        self._known: dict[str, tuple[Any, Any]] = {}

    def handle(
        self, app: list[Any], metadata: Metadata, content: RecordDict, context: Context
    ) -> tuple[Message, Context]:
        job = Job(rebuild(metadata, content), context)
        return tuple(handle(self._fetched("app", app), job))  # type: ignore[return-value]

    def train(self, app: list[Any], order: list[Any], nodes: Sequence[int], total: int) -> CohortAnswer:
        return answer(self._fetched("app", app).side, self._fetched("order", order), nodes, total)

    def _fetched(self, kind: str, reference: list[Any]) -> Any:
        # The reference comes in a list, which Ray leaves alone: fetched and unpickled once, not per message.
        known = self._known.get(kind)
        if known is None or known[0] != reference[0]:
            known = self._known[kind] = reference[0], importlib.import_module("ray").get(reference[0])
        return known[1]


def _shares(nodes: Sequence[int], number: int) -> list[Sequence[int]]:
    """`nodes` in `number` runs of about equal length, none empty."""
    number = min(number, len(nodes))
    ends = [len(nodes) * (i + 1) // number for i in range(number)]
    return [nodes[start:end] for start, end in zip([0, *ends], ends, strict=False)]
