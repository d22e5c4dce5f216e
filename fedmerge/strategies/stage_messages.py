"""Further message rounds within one merge: clients train on from what the server has matched so far."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from torch import Tensor

from fedmerge.errors import BadUpdate
from fedmerge.questions.stages import News, Stage
from fedmerge.strategies.reach import Reach
from fedmerge.update import ClientUpdate
from fedmerge.wire.flower_records import decode_update
from fedmerge.wire.keys import KEEP_KEY, SOURCES
from fedmerge.wire.record_values import to_arrays

__all__ = ["exchange"]

log = logging.getLogger("fedmerge")


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
