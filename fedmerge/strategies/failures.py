"""Clients that fail: read from their replies, named in the log, and quoted where a round cannot go on without them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence

from flwr.app import Message

from fedmerge.errors import ClientFailed, NoUsableUpdates
from fedmerge.strategies.wire import sender_of

__all__ = ["NO_REPLY", "check_mods", "failed_client", "failures_in", "quoted", "tell"]

log = logging.getLogger("fedmerge")

NO_REPLY = "no reply"
_MOD_FAILED_PRECONDITION = 6  # flwr.common.constant.ErrorCode.MOD_FAILED_PRECONDITION
_QUOTED = 3
_WRAPPED = re.compile(r"<class '(.+?)'>:<'(.*)'>", re.DOTALL)
"""How Flower writes an exception of a ClientApp."""
_NEXT = re.compile(r"The above exception was the direct cause|During handling of the above exception")
_NAMED = re.compile(r"client (\d+|on node -?\d+): ")


def failed_client(node: int, reason: str, round: int) -> ClientFailed:
    """What the reason of an error reply says, in one line: ours name their client, others only have a node.

    Examples
    --------
    >>> found = failed_client(5, "client 3: OSError: no disk\\nTraceback (most recent call last): ...", round=1)
    >>> found.client, found.reason
    (3, 'OSError: no disk')
    >>> failed_client(5, "Traceback (most recent call last):\\n  ...\\nKeyError: 'x'", round=1).reason
    "KeyError: 'x'"
    """
    first = (reason.strip() or "no reason given").splitlines()[0]
    named = _NAMED.match(first)
    client = named[1] if named else f"on node {node}"
    cause = first[named.end() :].strip() if named else _cause(reason.strip() or first)
    return ClientFailed(int(client) if client.isdecimal() else client, round, cause)


def _cause(reason: str) -> str:
    """In one line, what a reason that is not of ours says."""
    wrapped = _WRAPPED.fullmatch(reason)
    text = wrapped[2] if wrapped else reason
    if 'File "' not in text and not text.startswith("Traceback"):
        told = " ".join(text.split())
        return f"{wrapped[1].rpartition('.')[2]}: {told}" if wrapped else told
    # A traceback, or several of which the first is that of the cause: what was raised stands below.
    lines = [line.strip() for line in _NEXT.split(text)[0].splitlines() if line.strip()]
    kind, _, message = lines[-1].partition(": ")
    return f"{kind.rpartition('.')[2]}: {message}" if message else lines[-1]


def failures_in(replies: Iterable[Message], asked: Iterable[int], round: int) -> list[ClientFailed]:
    """Who replied with an error, and who was asked and did not reply at all, in order of nodes.

    A node counts once. Replies that do not name their node, as those of other grids need not, have the number -1; where
    there are any, nobody knows who did not reply.
    """
    senders = [(sender_of(message), message) for message in replies]
    broken = [(node, m.error.reason or f"error code {m.error.code}") for node, m in senders if m.has_error()]
    reasons = [(-1, reason) for node, reason in broken if node is None]
    reasons += {node: reason for node, reason in reversed(broken) if node is not None}.items()
    heard = {node for node, _ in senders}
    reasons += [(node, NO_REPLY) for node in set(asked) - heard if None not in heard]
    return [failed_client(node, reason, round) for node, reason in sorted(reasons)]


def tell(failed: Iterable[ClientFailed], about: str = "") -> None:
    """Warn of each, once."""
    for one in failed:
        log.warning("round %d%s: client %s failed: %s", one.round, about and f", {about}", one.client, one.reason)


def quoted(failed: Sequence[ClientFailed]) -> str:
    """Some of them, as an error can quote them.

    Examples
    --------
    >>> quoted([ClientFailed(client, 1, "OSError: no disk") for client in range(5)])
    'client 0 failed: OSError: no disk; client 1 failed: OSError: no disk; client 2 failed: OSError: no disk; \
and 2 more failed'
    """
    told = [f"client {one.client} failed: {one.reason}" for one in failed[:_QUOTED]]
    return "; ".join([*told, *([f"and {len(failed) - _QUOTED} more failed"] if len(failed) > _QUOTED else [])])


def check_mods(replies: Iterable[Message]) -> None:
    """Failures may pass. A mod that cannot take what the method exchanges, as ``LocalDpMod`` takes one ArrayRecord
    only, refuses in every round, and no round would change the model.

    Raises
    ------
    NoUsableUpdates
        All replies are errors, and one is a mod's.
    """
    known = list(replies)
    refused = [m for m in known if m.has_error() and m.error.code == _MOD_FAILED_PRECONDITION]
    if refused and all(m.has_error() for m in known):
        reason = (refused[0].error.reason or f"error code {refused[0].error.code}").partition("\n")[0]
        raise NoUsableUpdates(
            "no client could reply, for a mod of its ClientApp refuses what the method exchanges: "
            f"{reason} Take a method that merges models alone, such as fedavg, or leave out the mod."
        )
