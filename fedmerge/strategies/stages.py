"""Further message rounds within one merge: clients train on from what the server has matched so far."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedmerge.errors import BadUpdate, FedMergeError
from fedmerge.state import State
from fedmerge.strategies.wire import decode_update, reply_order, to_arrays
from fedmerge.update import ClientUpdate, Stage
from fedmerge.validation import check_update

__all__ = ["exchange"]

log = logging.getLogger("fedmerge")


def exchange(
    grid: Grid | None,
    arrays_key: str,
    config_key: str,
    weight_key: str,
    config: Mapping[str, int],
    nodes: Mapping[int, int],
    sent: Mapping[int, State],
    stage: Stage,
) -> list[ClientUpdate]:
    """Send each client its model and collect what it makes of it.

    Parameters
    ----------
    grid
        How to reach nodes.
    arrays_key, config_key, weight_key
        Names of records and of the number of examples, as in the strategy.
    config
        What every message says besides the stage.
    nodes
        The node of each client.
    sent
        A model for each client.
    stage
        What to train, and how long.

    Returns
    -------
    list of ClientUpdate
        Of those that answered with a model that can be used; a warning names the others.
    """
    if grid is None:
        raise FedMergeError("aggregate_train before configure_train: there is no grid to reach clients by")
    told = ConfigRecord(dict(config))
    told["stage"], told["epochs"], told["frozen"] = stage.number, stage.epochs, list(stage.frozen)
    messages = [
        Message(
            content=RecordDict({arrays_key: to_arrays(state), config_key: told}),
            message_type=MessageType.TRAIN,
            dst_node_id=nodes[client],
        )
        for client, state in sent.items()
    ]
    updates = []
    for client, reply in reply_order(m for m in grid.send_and_receive(messages) if not m.has_error()):
        try:
            update = decode_update(client, reply.content, arrays_key, weight_key)
            check_update(update, sent[client])
            updates.append(update)
        except BadUpdate as bad:
            log.warning("stage %d: client %d goes on with what it was sent: %s", stage.number, client, bad)
    for client in sorted(set(sent) - {u.client for u in updates}):
        log.warning("stage %d: client %d goes on with what it was sent", stage.number, client)
    return updates
