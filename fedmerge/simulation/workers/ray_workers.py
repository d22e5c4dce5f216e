"""Ray actors as workers: processes on this machine, or on the cluster that RAY_ADDRESS names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import ray
from flwr.app import RecordDict
from flwr.clientapp import ClientApp
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedmerge.clients.app import FedmergeClientApp
from fedmerge.errors import WorkersUnavailable
from fedmerge.simulation.workers.cohort_work import TRIED, Engine
from fedmerge.simulation.workers.flower_task import error_reply
from fedmerge.simulation.workers.ray_actor import Leader, Reference, Worker, gathered, remembered, train_on
from fedmerge.simulation.workers.ray_places import Places
from fedmerge.simulation.workers.ray_pool import Call, Pool
from fedmerge.simulation.workers.ray_session import join, leave, search_path
from fedmerge.simulation.workers.workers import Job, Outcome, Workers, divided
from fedmerge.strategies.order import Answer, Order
from fedmerge.training import EngineChoice

__all__ = ["RayWorkers"]

_PATIENCE = 300.0  # seconds for the first worker, which has to import torch, perhaps from a slow disk


class RayWorkers(Workers):
    """A pool of Ray actors, each running clients in a process of its own; one that is lost is replaced.

    What clients need is put into the object store once, and there all processes of a node read the same memory:
    a client must not change the examples that it is given in place.

    Parameters
    ----------
    count
        Number of actors; None takes one per CPU of the cluster.
    engine
        See :class:`~fedmerge.simulation.workers.workers.Workers`.
    client_timeout
        Seconds that a client may compute before it is cut off; None leaves it all the time it wants.
    """

    def __init__(
        self, count: int | None = None, *, engine: Engine = "auto", client_timeout: float | None = None
    ) -> None:
        super().__init__(engine)
        self._actors: list[Any] = []
        self._places: Places | None = None
        self._open = True
        self._session = join(count)
        try:
            self._places = Places(count)
            self._actors = [self._make_worker(number) for number in range(self._places.count)]
            self._pool: Pool = Pool(self._actors)
            self._await_first()
            self._leaders: Pool | None = self._make_leaders()
            self._limit = client_timeout
            if client_timeout is not None:  # the clock is for clients, not for processes that start
                ray.get([actor.ping.remote() for actor in self._actors])
        except BaseException:
            self.close()
            raise
        self._app: Any = None

    def use(self, app: ClientApp) -> None:
        """Put the app into the object store once, with its data; each process unpickles it at its first message."""
        super().use(app)
        if isinstance(app, FedmergeClientApp):
            app = app.with_data()
        self._app = ray.put(app)

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Give every idle actor the next job; each distinct content travels to the object store once."""
        contents = {id(job.message.content): job.message.content for job in jobs}
        shared = {key: ray.put(content) for key, content in contents.items()}
        app = self._told(self._app)

        def call(job: Job) -> Call:
            content, message = shared[id(job.message.content)], job.message
            return lambda worker: worker.handle.remote(app, message.metadata, content, job.context)

        outcomes = self._pool.run([call(job) for job in jobs], [self._limit] * len(jobs))
        for job, given in zip(jobs, outcomes, strict=True):
            if isinstance(given, RayError):
                yield Outcome(error_reply(job.message, job.context, given), job.context)
            else:
                yield Outcome(*given)

    def choose(self, order: Order, total: int) -> EngineChoice:
        """Measure on one of the workers."""
        app, told = self._told(self._app), self._told(ray.put(order.without_model()))
        limits = [None if self._limit is None else TRIED * self._limit]
        given = next(self._pool.run([lambda worker: worker.choose.remote(app, told, order.nodes[:64], total)], limits))
        return given if isinstance(given, EngineChoice) else EngineChoice("serial", f"the trial failed: {given}")

    def train_by(
        self, order: Order, total: int, engine: Literal["serial", "stacked"], kept: Mapping[int, RecordDict]
    ) -> Answer:
        """Divide the clients among nodes, and there among workers; what comes back is one sum, or the models."""
        app, told = self._told(self._app), self._told(ray.put(order.without_model()))
        if self._leaders is None:
            return train_on(self._pool, app, told, order, order.nodes, total, engine, self._limit, kept)

        def call(piece: Sequence[int]) -> Call:
            return lambda leader: leader.train.remote(
                app, told, piece, total, engine, self._limit, remembered(kept, piece)
            )

        return gathered(self._leaders, divided(order.nodes, len(self._leaders)), call, order)

    def close(self) -> None:
        """End the actors, and Ray too if it was started for them and nobody else uses it."""
        if not self._open:
            return
        self._open = False
        if ray.is_initialized():  # nobody has shut it down meanwhile
            for actor in self._actors:
                ray.kill(actor)
            if self._places is not None:
                self._places.free()
        self._actors = []
        leave(self._session)

    @staticmethod
    def _told(reference: Any) -> Reference:
        return [reference, search_path()]

    def _await_first(self) -> None:
        """Wait until one of the actors has begun, or could not: Ray itself tries for ever.

        Raises
        ------
        WorkersUnavailable
            None of them has within five minutes.
        """
        if not ray.wait([actor.ping.remote() for actor in self._actors], timeout=_PATIENCE)[0]:
            raise WorkersUnavailable(
                f"Ray runs, and none of {len(self._actors)} workers has started within {_PATIENCE:g} s: see its logs, "
                "take fewer workers, or train in this process with --workers 1"
            )

    def _make_worker(self, number: int) -> Any:
        assert self._places is not None
        return ray.remote(Worker).options(max_restarts=-1, **self._places.options(number)).remote()

    def _make_leaders(self) -> Pool | None:
        """One per node, where there are several."""
        if sum(node["Alive"] for node in ray.nodes()) < 2:  # type: ignore[no-untyped-call]
            return None
        by_node: dict[str, list[Any]] = {}
        where = ray.get([actor.ping.remote() for actor in self._actors])
        for actor, (node, _) in zip(self._actors, where, strict=True):
            by_node.setdefault(node, []).append(actor)
        leaders = [
            ray.remote(Leader)
            .options(
                num_cpus=0,
                max_restarts=-1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
            )
            .remote(actors)
            for node, actors in sorted(by_node.items())
        ]
        self._actors = self._actors + leaders
        return Pool(leaders)
