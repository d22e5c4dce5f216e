"""Which replies of an exchange count: of nodes that were asked, one each, to the message that they got."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message

__all__ = ["Heard", "Sent", "Stray", "heard", "sender_of"]


@dataclass(frozen=True)
class Sent:
    """One exchange as the server knows it.

    Parameters
    ----------
    nodes
        Who was asked.
    messages
        What each of them was sent, in the same order. A grid that numbers messages does it while it sends them, so
        their numbers are read afterwards.
    before
        Numbers of the messages of the exchange before this one.
    """

    nodes: Sequence[int]
    messages: Iterable[Message] = ()
    before: Collection[str] = ()

    @property
    def numbers(self) -> dict[str, int]:
        """By number of a message, as far as messages were numbered, the node that it was for."""
        told = ((message.metadata.message_id, node) for message, node in zip(self.messages, self.nodes, strict=False))
        return {number: node for number, node in told if number}

    @property
    def kinds(self) -> set[tuple[str, str]]:
        """Types and groups of the messages."""
        return {(message.metadata.message_type, message.metadata.group_id) for message in self.messages}


@dataclass(frozen=True)
class Stray:
    """A reply that does not count, the node that it names, and why."""

    node: int | None
    reason: str


@dataclass
class Heard:
    """What came back in one exchange.

    Parameters
    ----------
    replies
        Those that count, in the order in which they came, with their nodes; None on a grid that names none.
    errors
        Replies that say what went wrong, with their nodes.
    strays
        What does not count.
    silent
        Nodes that were asked and did not reply with anything.
    of_grid
        Whether the nodes are those that were asked. Otherwise the replies came by another way than the messages went,
        as in tests, and what the grid knows of its nodes says nothing about them.
    """

    replies: list[tuple[int | None, Message]] = field(default_factory=list)
    errors: list[tuple[int | None, Message]] = field(default_factory=list)
    strays: list[Stray] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    of_grid: bool = True


def heard(replies: Iterable[Message], sent: Sent | None) -> Heard:
    """Sort the replies to one exchange; what comes out does not depend on their order.

    A node is told by the grid, which in a deployment is Flower's SuperLink. What a grid does not tell at all, as those
    of tests may leave out nodes and numbers of messages, is held against nobody: it counts where most replies have it.

    A node that replies twice with the same counts once; if it says different things, nothing of it counts. An error
    beside a reply does not void the reply, for errors may also come from between the server and the node.

    Parameters
    ----------
    replies
        Whatever came.
    sent
        What was sent to whom; None where nobody knows.
    """
    found = Heard()
    numbers = {} if sent is None else sent.numbers
    asked = None if sent is None else frozenset(sent.nodes)
    told = [(_node(message, asked, numbers), message) for message in replies]
    if 2 * sum(node is not None for node, _ in told) < len(told):  # such a grid names nobody
        told, asked = [(None, message) for _, message in told], None
    nodes = {node for node, _ in told if node is not None}
    # Messages that went over a grid have numbers. Others may have replies from elsewhere.
    if asked is None or not (numbers or not nodes or 2 * len(nodes & asked) > len(nodes)):
        asked, found.of_grid = None, False
    of_node: dict[int | None, list[Message]] = {}
    for node, message in told:
        if nodes and node is None:
            found.strays.append(Stray(None, "its reply names no node"))
        elif asked is not None and node not in asked:
            found.strays.append(Stray(node, "its node was not asked"))
        elif message.has_error():
            found.errors.append((node, message))
        else:
            of_node.setdefault(node, []).append(message)
    kept = of_node if sent is None else _answering(of_node, sent, found.strays)
    for node, messages in kept.items():
        found.replies += [(node, message) for message in _one(node, messages, found.strays)]
    if asked is not None and (nodes or not told):
        found.silent = sorted(asked - nodes)
    found.strays.sort(key=lambda stray: (stray.node is not None, stray.node or 0, stray.reason))
    return found


def _node(message: Message, asked: frozenset[int] | None, numbers: Mapping[str, int]) -> int | None:
    """The node of a reply; of an error that Flower wrote in a node's stead, the node that the message was for."""
    node = sender_of(message)
    if message.has_error() and asked is not None and node not in asked:
        return numbers.get(_told(message, "reply_to_message_id"), node)
    return node


def _told(message: Message, name: str) -> Any:
    value = getattr(message.metadata, name, None)
    return value if isinstance(value, str) else None


def _answering(
    of_node: Mapping[int | None, list[Message]], sent: Sent, strays: list[Stray]
) -> dict[int | None, list[Message]]:
    """Without replies to messages that are known to be others', of another exchange or of another kind."""
    numbers, kinds, kept = sent.numbers, sent.kinds, dict(of_node)

    def own(node: int | None, message: Message) -> bool:
        number = _told(message, "reply_to_message_id")
        return number not in sent.before and (node is None or numbers.get(number, node) == node)

    def alike(node: int | None, message: Message) -> bool:
        return (_told(message, "message_type"), _told(message, "group_id")) in kinds

    # Counted by node, so that nobody outvotes others by replying often.
    usual = sum(any(alike(node, one) for one in messages) for node, messages in kept.items())
    checks = [(own, "it replies to a message that was for another node, or of another exchange")]
    if 2 * usual > len(kept):
        checks.append((alike, "it replies to a message of another kind"))
    for fits, reason in checks:
        for node, messages in kept.items():
            kept[node] = [message for message in messages if fits(node, message)]
            strays += [Stray(node, reason)] * (len(messages) - len(kept[node]))
    return kept


def _one(node: int | None, messages: list[Message], strays: list[Stray]) -> list[Message]:
    """The reply of a node; where nodes have no names, all replies."""
    if node is not None and len(messages) > 1:
        first, *others = messages
        if any(not _same(first, other) for other in others):
            strays += [Stray(node, f"its node replied {len(messages)} times, and not the same")] * len(messages)
            return []
        strays += [Stray(node, "its node replied again with the same, which counts once")] * len(others)
        messages = [first]
    empty = [message for message in messages if not message.has_content()]
    strays += [Stray(node, "its reply is empty")] * len(empty)
    return [message for message in messages if message.has_content()]


def _same(one: Message, other: Message) -> bool:
    if not one.has_content() or not other.has_content():
        return one.has_content() == other.has_content()
    return one.content is other.content or bool(one.content == other.content)


def sender_of(reply: Message) -> int | None:
    """The node that a reply came from, where its metadata say so."""
    node = reply.metadata.src_node_id
    return node if isinstance(node, int) and not isinstance(node, bool) else None
