"""Who is who in a federation: nodes are told by the grid, partitions by clients, and neither is taken for the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from flwr.app import Message

from fedmerge.strategies.failures import Name
from fedmerge.strategies.heard import Heard, Stray, heard
from fedmerge.wire.flower_records import claimed_partition, partition_of

__all__ = ["Identified", "Identities", "Known", "identify"]

_ANOTHERS = "it says that it is of partition {}, which is another node's"
_SEVERAL = "several nodes say that they are of partition {}, and nobody knows which one is"


class Known(NamedTuple):
    """As whom a node was first taken: of which partition, None where clients go by their nodes, and in which round."""

    partition: int | None
    round: int


@dataclass(frozen=True)
class Identified:
    """The replies of one exchange by client.

    Parameters
    ----------
    replies
        Clients, their nodes (None on a grid that names none) and what they replied, in order of clients.
    strays
        Replies of which nobody can say whose they are.
    """

    replies: Sequence[tuple[int, int | None, Message]]
    strays: Sequence[Stray]


@dataclass
class Identities:
    """What a server knows of its clients.

    A client's number is its partition, which is the same in every setting. Only where clients do not tell partitions,
    as those of a stock Flower app, all of them go by their nodes: never some by one and some by the other, for a node
    of one client may have the number of another's partition. Which it is, most clients of the first round say; it stays
    so.

    A partition is what a client says, so it is checked. On grids that know whose it is (simulations, and those that
    asked before the first round) nobody can take another's. Elsewhere it belongs to the node that came with it in an
    earlier round, for as long as that node is connected; who comes with another partition than before, or with one that
    is not its own, is left out. Where two nodes claim a partition that neither had before, nobody can say who is right,
    and both are left out.

    Parameters
    ----------
    known
        Nodes of earlier rounds.
    grid
        Whom nodes belong to; may tell of a node's partition, by ``partition_of_node``.
    """

    known: dict[int, Known] = field(default_factory=dict)
    grid: Any = None

    def identify(self, found: Heard, round: int) -> Identified:
        """Sort the replies to one training exchange by client, and remember who is who.

        Nothing that was learned in this round or later counts, so that a round can be repeated.
        """
        replies = found.replies
        usable = [message for _, message in replies if partition_of(message) is not None]
        mode = self._by_partition(round)
        by_partition = 2 * len(usable) > len(replies) if mode is None else mode
        grid = self.grid if found.of_grid else None
        told = replace(self, grid=grid)._by_claims(replies, round) if by_partition else _by_nodes(replies)
        for client, node, _ in told.replies:
            if node is not None and not self._before(node, round):
                self.known[node] = Known(client if by_partition else None, round)
        return told

    def name(self, node: int | None, round: int, claimed: int | None = None) -> int | str:
        """What to call the client of a node that failed: by its number only if it is sure, see :meth:`holder`.

        `claimed` is what an error reply says, which counts where the grid knows it to be so.
        """
        if node is None:
            return "on an unnamed node"
        if self._by_partition(round + 1) is False:
            return node if node in self.known else f"on node {node}"
        earlier = self._before(node, round)
        if earlier is not None and earlier.partition is not None:
            return earlier.partition
        return claimed if claimed is not None and claimed == self._vouched(node) else f"on node {node}"

    def naming(self, round: int) -> Name:
        """:meth:`name`, in a round, and whether what an error reply claims is true."""

        def name(node: int | None, claimed: int | None) -> tuple[int | str, bool]:
            called = self.name(node, round, claimed)
            return called, node is not None and claimed in (called, self._vouched(node))

        return name

    def holder(self, node: int | None, round: int) -> int | str:
        """What to call the client of a node whose reply does not count."""
        vouched = None if node is None else self._vouched(node)
        return self.name(node, round, None if vouched is None or vouched < 0 else vouched)

    def _by_partition(self, round: int) -> bool | None:
        """Whether clients went by partitions in rounds before this one; None where there was none."""
        return next((one.partition is not None for one in self.known.values() if one.round < round), None)

    def _before(self, node: int, round: int) -> Known | None:
        known = self.known.get(node)
        return known if known is not None and known.round < round else None

    def _vouched(self, node: int) -> int | None:
        """The partition of a node as its grid knows it, -1 where it is sure that there is none."""
        ask = getattr(self.grid, "partition_of_node", None)
        found = ask(node) if callable(ask) else None
        return found if isinstance(found, int) else None

    def _by_claims(self, replies: Sequence[tuple[int | None, Message]], round: int) -> Identified:
        strays: list[Stray] = []
        claims: dict[int, list[tuple[int | None, Message]]] = {}
        for node, message in replies:
            partition, own = partition_of(message), self._own(node, round)
            if partition is None:
                strays.append(Stray(node, _unusable(message)))
            elif own is not None and own != partition:
                holds = "is of none that is sure" if own < 0 else f"is of partition {own}"
                strays.append(Stray(node, f"it says that it is of partition {partition}, and its node {holds}"))
            else:
                claims.setdefault(partition, []).append((node, message))
        found, holders = [], self._holders(round)
        for partition, rivals in sorted(claims.items()):
            winner = self._winner(partition, [node for node, _ in rivals], holders)
            for place, (node, message) in enumerate(rivals):
                if place == winner:
                    found.append((partition, node, message))
                else:
                    several = winner is None and len(rivals) > 1
                    strays.append(Stray(node, (_SEVERAL if several else _ANOTHERS).format(partition)))
        return Identified(found, strays)

    def _holders(self, round: int) -> dict[int, list[int]]:
        """The nodes that came with each partition in earlier rounds, the first one first."""
        holders: dict[int, list[int]] = {}
        for node, known in self.known.items():
            if known.partition is not None and known.round < round:
                holders.setdefault(known.partition, []).append(node)
        return holders

    def _own(self, node: int | None, round: int) -> int | None:
        """The partition that a node has for good."""
        if node is None:
            return None
        vouched, earlier = self._vouched(node), self._before(node, round)
        return vouched if vouched is not None or earlier is None else earlier.partition

    def _winner(self, partition: int, nodes: list[int | None], holders: Mapping[int, Sequence[int]]) -> int | None:
        """The place in `nodes` of the one that a partition belongs to, None for nobody."""
        for place, node in enumerate(nodes):
            if node is not None and self._vouched(node) == partition:
                return place
        for holder in holders.get(partition, ()):
            if holder in nodes:
                return nodes.index(holder)
            if self.grid is None or holder in self.grid.get_node_ids():
                return None
        return 0 if len(nodes) == 1 else None

    def facts(self) -> dict[str, list[int | None]]:
        """All that is known, as JSON can hold it."""
        return {str(node): list(known) for node, known in self.known.items()}

    @classmethod
    def of_facts(cls, facts: object) -> Identities:
        """What :meth:`facts` gave, without what cannot be read."""
        found = cls()
        for node, known in facts.items() if isinstance(facts, Mapping) else ():
            whole = isinstance(known, list) and len(known) == 2 and _whole(known[1])
            if str(node).lstrip("-").isdecimal() and whole and (known[0] is None or _whole(known[0])):
                found.known[int(node)] = Known(*known)
        return found


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _by_nodes(replies: Sequence[tuple[int | None, Message]]) -> Identified:
    """By their nodes; by their places on a grid that names none."""
    numbered = [(place if node is None else node, node, message) for place, (node, message) in enumerate(replies)]
    return Identified(sorted(numbered, key=lambda one: one[0]), [])


def _unusable(message: Message) -> str:
    claimed = claimed_partition(message)
    if claimed is None:
        return "it does not say which partition it is of, as others do"
    return f"it says that it is of partition {claimed}, which cannot be"


def identify(replies: Iterable[Message]) -> list[tuple[int, Message]]:
    """Replies of one exchange by client, of a federation of which nothing else is known."""
    found = Identities().identify(heard(replies, None), 1)
    return [(client, message) for client, _, message in found.replies]
