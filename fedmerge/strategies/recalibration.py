"""Batch norms of a merged model, measured by the clients in a message round of its own."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.layout import Layout
from fedmerge.merging.buffers import pool_moments
from fedmerge.state import State, cast_like, is_sane
from fedmerge.statistics import BatchNormMoments
from fedmerge.statistics.sending.compression import decode
from fedmerge.strategies.reach import Reach
from fedmerge.wire.flower_records import statistics_from_reply, weight_of
from fedmerge.wire.record_values import to_arrays

__all__ = ["recalibrate"]

log = logging.getLogger("fedmerge")


def recalibrate(
    reach: Reach, state: dict[str, Tensor], clients: Sequence[int], norms: Collection[str] | None = None
) -> None:
    """Have these clients measure the merged model's batch norms, and pool what they find into `state`.

    Parameters
    ----------
    reach
        How to reach clients, and what every message says besides.
    state
        The merged model; changed in place.
    clients
        Who is asked.
    norms
        Names of the statistics that they measure, where a module tells; those of frozen parts stay as they are.

    Raises
    ------
    NoUsableUpdates
        A mod of the clients refuses such messages.
    """
    config = ConfigRecord({**reach.config, "needs": ["batch_norm"]})
    content = RecordDict({reach.arrays_key: to_arrays(reach.travelling(state)), reach.config_key: config})
    kind = "query.statistics"
    messages = {c: Message(content=content, message_type=kind, dst_node_id=reach.node_of(c)) for c in clients}
    measured = []
    for client, message in reach.send(messages, "recalibration").items():
        weight = weight_of(message.content, reach.weight_key)
        try:
            sent = statistics_from_reply(message.content, None).get("batch_norm", {})
            moments = decode(sent, lambda shapes: BatchNormMoments().check_shapes(shapes, state))
            fits = weight is not None and weight > 0 and _fits(moments, state, norms)
        except (InvalidOption, ValueError, TypeError, RuntimeError):
            fits = False
        if weight is None or not fits:
            log.warning("client %d: its batch-norm statistics cannot be used and are left out", client)
            continue
        measured.append((moments, weight))
    if not measured:
        log.warning("no client could recalibrate batch norm: its statistics are averages")
        return
    state.update(cast_like(pool_moments(measured), state))


def _fits(moments: State, model: State, norms: Collection[str] | None) -> bool:
    """Whether measured moments are of all batch norms of the model, and can be pooled."""
    wanted = Layout.of(model).float_buffers if norms is None else norms
    return set(moments) == set(wanted) and all(
        t.shape == model[n].shape and t.is_floating_point() and is_sane(t) and _may_be(n, t) for n, t in moments.items()
    )


def _may_be(name: str, tensor: Tensor) -> bool:
    """Variances below 0 would make a pooled one whose root is NaN, for everybody."""
    return not name.endswith("running_var") or bool((tensor >= 0).all())
