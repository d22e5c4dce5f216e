"""Clients that fail: read from their replies, named in the log, and quoted where a round cannot go on without them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Message

from fedmerge.errors import ClientFailed, NoUsableUpdates
from fedmerge.plain_text import both_ends, one_line
from fedmerge.strategies.heard import Heard

__all__ = ["NO_REPLY", "Name", "check_mods", "failed_client", "failed_nodes", "failures_in", "quoted", "tell"]

log = logging.getLogger("fedmerge")

NO_REPLY = "no reply"
Name = Callable[[int | None, int | None], tuple[int | str, bool]]
"""``name(node, claimed)``: what to call the client of a node whose error reply says that it is client `claimed`, and
whether that is known to be true."""
_DIGITS = 12  # of a client's number: longer ones are none
_MOD_FAILED_PRECONDITION = 6  # flwr.common.constant.ErrorCode.MOD_FAILED_PRECONDITION
_QUOTED = 3
_LONGEST = 1000  # characters of what a client says
_WRAPPED = re.compile(r"<class '(.+?)'>:<'(.*)'>", re.DOTALL)
"""How Flower writes an exception of a ClientApp."""
_NEXT = re.compile(r"The above exception was the direct cause|During handling of the above exception")
_NAMED = re.compile(r"client (\d{1,18}|on node -?\d{1,20}): ", re.ASCII)


def failed_client(node: int | None, reason: str, round: int, name: Name) -> ClientFailed:
    """What the reason of an error reply says, in one line, and whose it is by the node that it came from.

    Ours begin with their client: that is for `name` to believe, or else it is left in the reason as what was said.

    Examples
    --------
    >>> def name(node, claimed):
    ...     return (3, True) if claimed == 3 else (f"on node {node}", False)
    >>> found = failed_client(5, "client 3: OSError: no disk\\nTraceback (most recent call last): ...", 1, name)
    >>> found.client, found.reason
    (3, 'OSError: no disk')
    >>> found = failed_client(5, "client 4: OSError: no disk\\nTraceback (most recent call last): ...", 1, name)
    >>> found.client, found.reason
    ('on node 5', 'it says that it is client 4: OSError: no disk')
    >>> failed_client(5, "Traceback (most recent call last):\\n  ...\\nKeyError: 'x'", 1, name).reason
    "KeyError: 'x'"
    """
    reason = both_ends(reason)
    first = (reason.strip() or "no reason given").splitlines()[0][:_LONGEST]
    named = _NAMED.match(first)
    claimed = int(named[1]) if named and named[1].isdecimal() and len(named[1]) < _DIGITS else None
    client, believed = name(node, claimed)
    if not named:
        return ClientFailed(client, round, _cause(reason.strip() or first)[:_LONGEST])
    cause = first[named.end() :].strip()
    believed = believed or named[1] == f"on node {node}"
    return ClientFailed(client, round, cause if believed else f"it says that it is client {named[1]}: {cause}")


def _cause(reason: str) -> str:
    """In one line, what a reason that is not of ours says."""
    wrapped = _WRAPPED.fullmatch(reason)
    text = wrapped[2] if wrapped else reason
    if 'File "' not in text and not text.startswith("Traceback"):
        told = " ".join(text.split())
        return f"{wrapped[1].rpartition('.')[2]}: {told}" if wrapped else told
    # A traceback, or several of which the first is that of the cause: what was raised stands below.
    found = next((part for part in _NEXT.split(text) if part.strip()), text)
    lines = [line.strip() for line in found.splitlines() if line.strip()]
    kind, _, message = lines[-1].partition(": ")
    return f"{kind.rpartition('.')[2]}: {message}" if message else lines[-1]


def failures_in(found: Heard, round: int, name: Name) -> list[ClientFailed]:
    """Who replied with an error, and who was asked and did not reply at all, in order of nodes.

    A node counts once. Errors that do not name their node, as those of other grids need not, come first, each by
    itself.
    """
    return [failed_client(node, reason, round, name) for node, reason in failed_nodes(found)]


def failed_nodes(found: Heard) -> list[tuple[int | None, str]]:
    """Nodes that :func:`failures_in` makes clients of, and what their errors say; None for errors that name no node."""
    broken = [(node, m.error.reason or f"error code {m.error.code}") for node, m in found.errors]
    unnamed: list[tuple[int | None, str]] = [(None, reason) for node, reason in broken if node is None]
    known = {node: reason for node, reason in reversed(broken) if node is not None}
    known |= dict.fromkeys(found.silent, NO_REPLY)
    return [*unnamed, *sorted(known.items())]


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
        All replies are errors, and most are a mod's.
    """
    known = list(replies)
    refused = [m for m in known if m.has_error() and m.error.code == _MOD_FAILED_PRECONDITION]
    if 2 * len(refused) > len(known) and all(m.has_error() for m in known):
        reason = one_line((refused[0].error.reason or f"error code {refused[0].error.code}").partition("\n")[0])
        raise NoUsableUpdates(
            "no client could reply, for a mod of its ClientApp refuses what the method exchanges: "
            f"{reason} Take a method that merges models alone, such as fedavg, or leave out the mod."
        )
