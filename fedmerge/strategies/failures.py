"""Clients that reply with an error: named in the log, and the end of the run where no round could go otherwise."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from flwr.app import Message

from fedmerge.errors import NoUsableUpdates

__all__ = ["answered"]

log = logging.getLogger("fedmerge")

_MOD_FAILED_PRECONDITION = 6  # flwr.common.constant.ErrorCode.MOD_FAILED_PRECONDITION


def answered(replies: Iterable[Message]) -> list[Message]:
    """Those replies that are no errors; a warning names the others, whom a deployment would show nowhere else.

    Failures may pass. A mod that cannot take what the method exchanges, as ``LocalDpMod`` takes one ArrayRecord only,
    refuses in every round, and no round would change the model.

    Raises
    ------
    NoUsableUpdates
        All replies are errors, and one is a mod's.
    """
    replies = list(replies)
    good, failed = [r for r in replies if not r.has_error()], [r for r in replies if r.has_error()]
    for reply in failed:
        log.warning("node %s failed: %s", reply.metadata.src_node_id, _first_line(reply))
    refused = [reply for reply in failed if reply.error.code == _MOD_FAILED_PRECONDITION]
    if refused and not good:
        raise NoUsableUpdates(
            "no client could reply, for a mod of its ClientApp refuses what the method exchanges: "
            f"{_first_line(refused[0])} Take a method that merges models alone, such as fedavg, or leave out the mod."
        )
    return good


def _first_line(reply: Message) -> str:
    return (reply.error.reason or f"error code {reply.error.code}").partition("\n")[0]
