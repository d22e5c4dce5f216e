"""Notices strategies that wait for more nodes than a simulated federation will ever have."""

from __future__ import annotations

import logging
import time

from fedmerge.errors import InvalidOption
from fedmerge.strategies.flower_frames import missing_nodes
from fedmerge.strategies.participation import remedy

__all__ = ["Waiting"]

log = logging.getLogger("fedmerge")

_PATIENCE = 5.0  # seconds of asking for nodes and nothing else, before it is told
_TELL_EVERY = 30.0


class Waiting:
    """Watches who asks a grid for its nodes, of which there are `nodes` for good.

    Flower's own strategies ask in a loop that ends when there are enough, and do not say how many they want. That is
    read from their loop, so that nobody who asks often for another reason is refused. Whoever waits in a way of his
    own is only warned.
    """

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self.used()

    def used(self) -> None:
        """Messages were sent: nobody waits."""
        self._since: float | None = None
        self._times = 0
        self._told = -_TELL_EVERY

    def asked(self) -> None:
        """Somebody asks for the nodes.

        Raises
        ------
        InvalidOption
            A strategy of Flower's, which waits for more than there are.
        """
        missing = missing_nodes(self._nodes)
        if missing is not None:
            raise InvalidOption(remedy(self._nodes, missing))
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        self._times += 1
        if self._times > 3 and now - self._since > _PATIENCE and now - self._told > _TELL_EVERY:
            self._told = now
            log.warning(
                "the nodes were asked for %d times in %.0f s and nothing was sent to them: this federation has %d, and "
                "no more will come, so whoever waits for more waits for ever", self._times, now - self._since,
                self._nodes,
            )  # fmt: skip
