"""How a merge reaches its clients again, after their updates: with questions about its model, and with stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedmerge.errors import BadUpdate, ClientFailed, FedMergeError, NoAnswer, shown
from fedmerge.layout import Layout
from fedmerge.questions import Answer, Question
from fedmerge.questions.stages import News, Stage
from fedmerge.state import State
from fedmerge.strategies.failures import check_mods, failures_in
from fedmerge.strategies.heard import Sent, heard
from fedmerge.update import ClientUpdate
from fedmerge.wire.flower_records import decode_update
from fedmerge.wire.keys import ACTION, KEEP_KEY, OWN, SOURCES
from fedmerge.wire.question_records import OCCASION, OF, read_answers, write_question
from fedmerge.wire.record_values import to_arrays

__all__ = ["Reach", "ask", "exchange"]

log = logging.getLogger("fedmerge")


@dataclass(frozen=True)
class Reach:
    """The clients of one merge.

    Parameters
    ----------
    grid
        How to reach nodes; None where no round has been configured.
    nodes
        The node of each client.
    config
        What every message says besides what it is about.
    arrays_key, config_key, weight_key
        Names of records and of the number of examples, as in the strategy.
    timeout
        Seconds to wait for replies.
    round
        Of the merge.
    on_failure
        Called with those who failed in an exchange, and what it was about.
    layout
        Which tensors of a model travel to them, where it is not all.
    """

    grid: Grid | None
    nodes: Mapping[int, int]
    config: Mapping[str, Any]
    arrays_key: str = "arrays"
    config_key: str = "config"
    weight_key: str = "num-examples"
    timeout: float | None = None
    round: int = 0
    on_failure: Callable[[Sequence[ClientFailed], str], None] | None = None
    layout: Layout | None = None

    def travelling(self, state: State) -> State:
        """The part of a model that a message to these clients brings."""
        return state if self.layout is None else self.layout.travelling(state)

    def send(
        self, messages: Mapping[int, Message], about: str, late: Callable[[Message], bool] = lambda reply: False
    ) -> dict[int, Message]:
        """Send a message to each of these clients: their replies that are no errors, in order of clients.

        Who replied is told by the node and not by what the reply says; see :func:`~fedmerge.strategies.heard.heard`.
        What `late` says is a reply to another exchange is not looked at, and contradicts nothing that a node says now.

        Raises
        ------
        NoAnswer
            There is no grid.
        NoUsableUpdates
            A mod of the clients refuses such messages.
        """
        if self.grid is None:
            raise NoAnswer("aggregate_train before configure_train: there is no grid to reach clients by")
        # Read before they are sent: a grid within may number nodes otherwise.
        asked = {message.metadata.dst_node_id: client for client, message in messages.items()}
        sent = list(messages.values())
        replies = list(self.grid.send_and_receive(sent, timeout=self.timeout))
        for reply in filter(late, replies):
            client = asked.get(reply.metadata.src_node_id, f"on node {reply.metadata.src_node_id}")
            log.warning("client %s: an answer to another exchange came late, and is not opened", client)
        found = heard((reply for reply in replies if not late(reply)), Sent(list(asked), sent))

        def name(node: int | None, claimed: int | None) -> tuple[int | str, bool]:
            called = "on an unnamed node" if node is None else asked.get(node, f"on node {node}")
            return called, claimed == called

        failed = failures_in(found, self.round, name) if found.errors or found.silent else []
        failed += [ClientFailed(name(stray.node, None)[0], self.round, stray.reason) for stray in found.strays]
        if failed and self.on_failure is not None:
            self.on_failure(failed, about)
        if found.errors:
            check_mods([message for _, message in (*found.errors, *found.replies)])
        return dict(sorted(((asked[n], message) for n, message in found.replies if n is not None), key=itemgetter(0)))

    def node_of(self, client: int) -> int:
        """The node of a client that is to be asked again.

        Raises
        ------
        NoAnswer
            Its reply did not name one.
        """
        if client not in self.nodes:
            raise NoAnswer(f"client {client} cannot be asked again: its reply does not say which node it is of")
        return self.nodes[client]


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


def exchange(reach: Reach, sent: Mapping[int, News], stage: Stage) -> list[ClientUpdate]:
    """Tell each client what is new and collect what it makes of it.

    Parameters
    ----------
    reach
        How to reach clients, and what every message says besides the stage.
    sent
        What to tell each client.
    stage
        What to train, how long, and what to send back.

    Returns
    -------
    list of ClientUpdate
        Of those that answered with tensors that can be used; a warning names the others.

    Raises
    ------
    NoUsableUpdates
        A mod of the clients refuses such messages.
    """
    # A client whose node nobody knows stays at what it sent; where that is all of them, the grid is to blame.
    sent = {client: news for client, news in sent.items() if client in reach.nodes} or sent
    told = ConfigRecord(dict(reach.config))
    told["stage"], told["epochs"] = stage.number, stage.epochs
    told[KEEP_KEY] = bool(told.get(KEEP_KEY)) or not stage.last
    told["frozen"], told["send"] = list(stage.frozen), list(stage.send)
    messages = {
        client: Message(
            content=RecordDict(
                {
                    reach.arrays_key: to_arrays(reach.travelling(news.settled)),
                    SOURCES: to_arrays(_packed(news)),
                    reach.config_key: told,
                }
            ),
            message_type=MessageType.TRAIN,
            dst_node_id=reach.node_of(client),
        )
        for client, news in sent.items()
    }
    updates: list[ClientUpdate] = []
    for client, reply in reach.send(messages, f"stage {stage.number}").items():
        try:
            updates.append(decode_update(client, reply.content, reach.arrays_key, reach.weight_key))
        except BadUpdate as bad:
            log.warning("stage %d: client %d: %s", stage.number, client, bad)
    return updates


def _packed(news: News) -> dict[str, Tensor]:
    """The re-ordering under ``"axis name"``."""
    return {f"{axis} {name}": index.to(torch.int32) for (name, axis), index in news.sources.items()}
