"""Batch norms of a merged model, measured by the clients in a message round of its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedmerge.buffers import pool_moments
from fedmerge.errors import FedMergeError, InvalidOption
from fedmerge.state import Layout, State, cast_like, is_sane
from fedmerge.statistics import BatchNormMoments
from fedmerge.statistics.compression import decode
from fedmerge.strategies.wire import reply_order, statistics_from_reply, to_arrays, weight_of

__all__ = ["recalibrate"]

log = logging.getLogger("fedmerge")


def recalibrate(
    grid: Grid | None,
    arrays_key: str,
    config_key: str,
    weight_key: str,
    server_round: int,
    state: dict[str, Tensor],
    nodes: Sequence[int],
    *,
    timeout: float | None = None,
) -> None:
    """Have these nodes measure the merged model's batch norms, and pool what they find into `state`.

    Parameters
    ----------
    grid
        How to reach nodes.
    arrays_key, config_key, weight_key
        Names of records and of the number of examples, as in the strategy.
    server_round
        For the messages.
    state
        The merged model; changed in place.
    nodes
        Who is asked.
    timeout
        Seconds to wait for replies.
    """
    if grid is None:
        raise FedMergeError("aggregate_train before configure_train: there is no grid to reach clients by")
    config = ConfigRecord({"server-round": server_round, "needs": ["batch_norm"]})
    content = RecordDict({arrays_key: to_arrays(state), config_key: config})
    messages = [Message(content=content, message_type="query.statistics", dst_node_id=node) for node in nodes]
    measured = []
    for client, message in reply_order(
        m for m in grid.send_and_receive(messages, timeout=timeout) if not m.has_error()
    ):
        weight = weight_of(message.content, weight_key)
        try:
            sent = statistics_from_reply(message.content, None).get("batch_norm", {})
            moments = decode(sent, lambda shapes: BatchNormMoments().check_shapes(shapes, state))
            fits = weight is not None and weight > 0 and _fits(moments, state)
        except (InvalidOption, ValueError, TypeError, RuntimeError):
            fits = False
        if weight is None or not fits:
            log.warning("client %d: its batch-norm statistics cannot be used and are left out", client)
            continue
        measured.append((moments, weight))
    if not measured:
        log.warning("no client could recalibrate batch norm in round %d: its statistics are averages", server_round)
        return
    state.update(cast_like(pool_moments(measured), state))


def _fits(moments: State, model: State) -> bool:
    """Whether measured moments are of all batch norms of the model, and can be pooled."""
    norms = set(Layout.of(model).float_buffers)
    return set(moments) == norms and all(
        t.shape == model[n].shape and t.is_floating_point() and is_sane(t) for n, t in moments.items()
    )
