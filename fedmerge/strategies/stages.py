"""Further message rounds within one merge: clients train on from what the server has matched so far."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from torch import Tensor, nn

from fedmerge.errors import BadUpdate, ModelError
from fedmerge.stages import News, Stage, catch_up
from fedmerge.strategies.reach import Reach
from fedmerge.strategies.wire import decode_update, from_arrays, to_arrays
from fedmerge.update import ClientUpdate

__all__ = ["KEEP_KEY", "exchange", "keep", "kept_model", "own_model"]

log = logging.getLogger("fedmerge")

KEEP_KEY = "keep-model"
"""Entry of a message's ConfigRecord: the client keeps its model in its Context until the next message."""
_KEPT = "fedmerge.model"
_SOURCES = "sources"


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
                {reach.arrays_key: to_arrays(news.settled), _SOURCES: to_arrays(_packed(news)), reach.config_key: told}
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


def keep(context: Context, config: ConfigRecord, model: nn.Module) -> None:
    """Leave the model in the client's Context where the message asks for it, and nothing where it does not."""
    context.state.pop(_KEPT, None)
    if config.get(KEEP_KEY):
        context.state[_KEPT] = to_arrays(model.state_dict())


def own_model(context: Context) -> dict[str, Tensor]:
    """What the client has kept.

    Raises
    ------
    ModelError
        It has kept nothing.
    """
    kept = context.state.array_records.get(_KEPT)
    if kept is None:
        raise ModelError("the message is about the model that the client trained, and there is none in its Context")
    return from_arrays(kept)


def kept_model(message: Message, context: Context) -> dict[str, Tensor]:
    """What the client has kept, brought up to date with what the message tells.

    Raises
    ------
    ModelError
        It has kept nothing, or another model than the message is about.
    """
    records = message.content.array_records
    kept, sources = own_model(context), records.get(_SOURCES)
    if sources is None:
        raise ModelError("the message of a stage does not say how neurons were re-ordered")
    settled = next((record for key, record in records.items() if key != _SOURCES), ArrayRecord())
    moved = {}
    try:
        for key, index in from_arrays(sources).items():
            axis, _, name = key.partition(" ")
            moved[name, int(axis)] = index.long()
        return catch_up(kept, News(from_arrays(settled), moved))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"the message of a stage cannot be read: {error}") from error
