"""A Flower Grid whose nodes are virtual clients: any Flower strategy runs on it, unmodified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from types import TracebackType
from typing import Any, Literal, Self

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from fedmerge.clients.app import FedmergeClientApp
from fedmerge.errors import ConfigError
from fedmerge.lookup.keyword_check import check_function, tell_keywords
from fedmerge.simulation.grids.waiting import Waiting
from fedmerge.simulation.workers.cohort_work import Engine
from fedmerge.simulation.workers.flower_task import FIRST_NODE, become_server_task, new_run, stamp
from fedmerge.simulation.workers.starting import make_workers, parse_workers
from fedmerge.simulation.workers.workers import Job, Workers
from fedmerge.strategies.order import Answer, Order, TrainingGrid
from fedmerge.strategies.rounds import by_message
from fedmerge.wire.flower_records import PARTITION_KEY

__all__ = ["SimulationGrid", "make_workers", "parse_workers"]


@tell_keywords({"clients": "num_clients", "num_supernodes": "num_clients", "app": "client_app"})
class SimulationGrid(TrainingGrid):
    """Virtual clients behind Flower's Grid interface, without SuperLink, sockets or sleeping.

    Node ``partition + 2`` is the client with ``partition-id`` `partition`. What a client keeps in its
    ``Context.state`` is there in its next message. A client that raises gives one error reply, whose reason
    is the traceback.

    Parameters
    ----------
    client_app
        Any Flower ClientApp, such as :func:`fedmerge.strategies.client_app` makes.
    num_clients
        Number of virtual clients.
    workers
        1 or ``"auto"`` runs clients in this process, a larger number on so many Ray actors, ``"ray"`` on one
        actor per CPU of the cluster that RAY_ADDRESS names, or of this machine. GPUs are shared among actors.
        Workers made before, by :func:`make_workers`, serve one grid after the other and are not closed here.
    engine
        How clients of ours train for a strategy of ours: ``"serial"``, one after the other, ``"stacked"``, many in one
        call, or ``"auto"``, whichever is faster on the first clients. Workers made before have one of their own.
    client_timeout
        Seconds that a client may compute by itself: on Ray one that takes longer, perhaps for ever, is cut off and has
        failed. In this process nobody can be cut off. Workers made before have one of their own.
    run_config
        What clients find in ``Context.run_config``.

    Raises
    ------
    ConfigError
        No clients, workers that cannot be understood, or Ray is not installed.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> with SimulationGrid(ClientApp(), num_clients=3) as grid:
    ...     list(grid.get_node_ids())
    [2, 3, 4]
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        *,
        workers: int | Literal["auto", "ray"] | Workers = "auto",
        engine: Engine = "auto",
        client_timeout: float | None = None,
        run_config: UserConfig | None = None,
    ) -> None:
        _check_app(client_app)
        number: Any = num_clients  # whatever was given
        if isinstance(number, bool) or not isinstance(number, Integral) or int(number) < 1:
            raise ConfigError(f"a federation needs a whole number of clients, at least one client, got {num_clients!r}")
        become_server_task()
        self._owned = not isinstance(workers, Workers)
        self._workers = workers if isinstance(workers, Workers) else make_workers(workers, engine, client_timeout)
        self._workers.use(client_app)
        # A mod wants to see messages.
        self._is_ours = isinstance(client_app, FedmergeClientApp) and not client_app.mods
        self._personal = isinstance(client_app, FedmergeClientApp) and bool(client_app.client.personal)
        self._asked = 0  # times that somebody asked for the nodes since anything was sent
        self._run: Any = new_run()
        self._num_clients, self._waiting = num_clients, Waiting(num_clients)
        self._run_config: UserConfig = run_config or {}
        # Only clients that were called have a context: known clients cost nothing.
        self._contexts: dict[int, Context] = {}
        self._replies: dict[str, Message] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, if they were started here."""
        if self._owned:
            self._workers.close()

    @property
    def workers(self) -> Workers:
        """Who runs the clients."""
        return self._workers

    def client_states(self) -> dict[int, RecordDict]:
        """What clients keep in their ``Context.state``, by node; those that keep nothing are left out."""
        return {node: context.state for node, context in self._contexts.items() if len(context.state)}

    def set_client_states(self, states: Mapping[int, RecordDict]) -> None:
        """Let clients find what they kept, be it in an earlier process."""
        for node, state in states.items():
            self._context(node).state = state

    def set_run(self, run: Any) -> None:
        """Set the run that :attr:`run` shows."""
        self._run = run

    @property
    def run(self) -> Any:
        """Flower's description of the run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message; Flower asks for this deprecated method, ``Message(...)`` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all nodes.

        Raises
        ------
        InvalidOption
            Flower's own loop asks, which waits for more nodes than there are.
        """
        self._asked += 1
        if self._asked > 1:  # who asks once waits for nothing
            self._waiting.asked()
        return self._nodes

    @property
    def most_nodes(self) -> int:
        """How many nodes there will ever be."""
        return self._num_clients

    def partition_of_node(self, node: int) -> int | None:
        """Which partition a node holds: a client may say otherwise."""
        if node not in self._contexts and node not in self._nodes:
            return None
        told = self._context(node).node_config.get(PARTITION_KEY)
        return told if isinstance(told, int) else None

    @property
    def _nodes(self) -> range:
        return range(FIRST_NODE, FIRST_NODE + self._num_clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the clients that `messages` are for; their replies wait to be pulled."""
        self._use()
        jobs = []
        for message in messages:
            stamp(message)
            jobs.append(Job(message, self._context(message.metadata.dst_node_id)))
        for job, (reply, context) in zip(jobs, self._workers.run(jobs), strict=True):
            self._contexts[job.message.metadata.dst_node_id] = context
            self._replies[job.message.metadata.message_id] = reply
        return [job.message.metadata.message_id for job in jobs]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies to the messages with these ids."""
        return [self._replies.pop(identity) for identity in list(message_ids) if identity in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run the clients and return their replies, in the order of `messages`; `timeout` is not for virtual
        clients, who share a machine: see ``client_timeout``."""
        return self.pull_messages(self.push_messages(messages))

    def train(self, order: Order, *, timeout: float | None = None) -> Answer:
        """Run the clients of an order without a message for each; by message where their app is not ours, has mods
        that want to see one, or somebody on the server does; or where clients keep what the server knows nothing of."""
        if not self._is_ours or order.by_message or (self._personal and not order.keeps):
            return by_message(self, order, timeout)
        self._use()
        if not order.nodes:
            return Answer()
        self._check_node(order.nodes[-1])
        kept = {node: self._context(node).state for node in order.nodes} if order.keeps else {}
        answer = self._workers.train(order, self._num_clients, kept)
        self.set_client_states(answer.kept)
        return answer

    def _use(self) -> None:
        """Something is sent: nobody waits for nodes."""
        if self._asked > 1:
            self._waiting.used()
        self._asked = 0

    def _check_node(self, node: int) -> None:
        if node not in self._nodes:
            raise ConfigError(f"there is no node {node}: nodes are {FIRST_NODE} to {self._num_clients + 1}")

    def _context(self, node: int) -> Context:
        self._check_node(node)
        if node not in self._contexts:
            config: UserConfig = {PARTITION_KEY: node - FIRST_NODE, "num-partitions": self._num_clients}
            self._contexts[node] = Context(
                run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config=dict(self._run_config)
            )
        return self._contexts[node]


def _check_app(app: Any) -> None:
    """Make sure that clients can be called with Flower's messages."""
    if not callable(app):
        raise ConfigError(
            f"client_app must be a ClientApp, got a {type(app).__name__}: make one with "
            "fedmerge.strategies.client_app(model_fn, data_fn), or flwr.clientapp.ClientApp()"
        )
    if not isinstance(app, ClientApp):
        check_function("client_app", app, ("message", "context"))
    if getattr(app, "_call", None) is not None:
        raise ConfigError(
            "client_app was made of client_fn, Flower's older interface (NumPyClient), which no strategy of "
            "flwr.serverapp speaks: write its training as a function under @app.train()"
        )
