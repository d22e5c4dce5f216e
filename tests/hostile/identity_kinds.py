"""Who hostile clients say that they are: ``kind(rng, replies, place)`` gives all that the server receives then.

``replies`` are the honest replies of all clients, ``place`` which of them is hostile.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from flwr.app import ConfigRecord, Error, Message, RecordDict

from tests.answered import answer, shallow
from tests.hostile.kind import Kind, table

__all__ = ["IDENTITY"]

Replies = list[Message]


def _as(told: Callable[[Replies, int], Any]):
    """Another partition than its own; None for none."""

    def make(rng: random.Random, replies: Replies, place: int) -> Replies:
        content = shallow(replies[place].content)
        content.pop("client", None)
        partition = told(replies, place)
        if partition is not None:
            content["client"] = ConfigRecord({"partition-id": partition})
        return _with(replies, place, answer(_node(replies[place]), content))

    return make


def _node(reply: Message) -> int:
    return reply.metadata.src_node_id


def _with(replies: Replies, place: int, *instead: Message) -> Replies:
    return [*replies[:place], *instead, *replies[place + 1 :]]


def _other(replies: Replies, place: int) -> Message:
    return replies[(place + 1) % len(replies)]


def _partition(reply: Message) -> int:
    return reply.content.config_records["client"]["partition-id"]


def _stranger(rng: random.Random, replies: Replies, place: int) -> Replies:
    """A reply more, of a node that was not asked."""
    content = shallow(replies[place].content)
    return [*replies, answer(987_654_321, content)]


def _stranger_first(rng: random.Random, replies: Replies, place: int) -> Replies:
    content = shallow(replies[place].content)
    content["client"] = ConfigRecord({"partition-id": 77})
    return [answer(987_654_321, content), *replies]


def _twice(rng: random.Random, replies: Replies, place: int) -> Replies:
    again = answer(_node(replies[place]), shallow(replies[place].content))
    return _with(replies, place, replies[place], again)


def _twice_otherwise(rng: random.Random, replies: Replies, place: int) -> Replies:
    content = shallow(_other(replies, place).content)
    content["client"] = replies[place].content["client"]
    return [*replies, answer(_node(replies[place]), content)]


def _twice_elsewhere(rng: random.Random, replies: Replies, place: int) -> Replies:
    """A second reply, as somebody else."""
    content = shallow(replies[place].content)
    content["client"] = _other(replies, place).content["client"]
    return [*replies, answer(_node(replies[place]), content)]


def _hundred(rng: random.Random, replies: Replies, place: int) -> Replies:
    """A hundred replies of one node, each as another client."""
    found = list(replies)
    for i in range(100):
        content = shallow(replies[place].content)
        content["client"] = ConfigRecord({"partition-id": 1000 + i})
        found.append(answer(_node(replies[place]), content))
    return found


def _emptied(rng: random.Random, replies: Replies, place: int) -> Replies:
    return _with(replies, place, answer(_node(replies[place]), RecordDict()))


def _failed(rng: random.Random, replies: Replies, place: int) -> Replies:
    return _with(replies, place, answer(_node(replies[place]), Error(1, "\x1b[31m" + "x" * 10_000)))


def _failed_and_replied(rng: random.Random, replies: Replies, place: int) -> Replies:
    return [answer(_node(replies[place]), Error(1, "gone")), *replies]


def _evaluated(rng: random.Random, replies: Replies, place: int) -> Replies:
    """A reply to another kind of message."""
    return _with(replies, place, answer(_node(replies[place]), replies[place].content, "evaluate"))


def _kind(name: str, make, must_drop: bool = True) -> Kind:
    return Kind(name, "identity", make, must_drop)


IDENTITY = table(
    "identity",
    _kind("no partition", _as(lambda replies, place: None), must_drop=False),
    _kind("another's partition", _as(lambda replies, place: _partition(_other(replies, place)))),
    _kind("another's node as its partition", _as(lambda replies, place: _node(_other(replies, place))), False),
    _kind("its own node as its partition", _as(lambda replies, place: _node(replies[place])), False),
    *(_kind(f"partition {x!r}", _as(lambda replies, place, x=x: x), must_drop=False)
      for x in (-1, 2**63 - 1, "0", True, [0], 1.5, b"0", "\x1b[31m\n", "0" * 10_000)),
    _kind("a node that was not asked", _stranger, must_drop=False),
    _kind("a node that was not asked, first", _stranger_first, must_drop=False),
    _kind("two equal replies", _twice, must_drop=False),
    _kind("two replies that differ", _twice_otherwise, must_drop=False),
    _kind("a second reply as another", _twice_elsewhere, must_drop=False),
    _kind("a hundred replies", _hundred, must_drop=False),
    _kind("an empty reply", _emptied),
    _kind("an error", _failed),
    _kind("an error and a reply", _failed_and_replied, must_drop=False),
    _kind("a reply to another question", _evaluated, must_drop=False),
)  # fmt: skip
