"""Strategies that wait for more nodes than a federation will ever have: refused, or at least told."""

from __future__ import annotations

import logging
import sys
import time
from types import FrameType

from fedmerge.errors import InvalidOption
from fedmerge.strategies.participation import shortage
from fedmerge.strategies.sampling import remedy

__all__ = ["Waiting"]

log = logging.getLogger("fedmerge")

_DEPTH = 8
"""Frames between a strategy of Flower's and a grid: its function, and the grids around this one."""
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
        missing = _missing(sys._getframe(1), self._nodes)
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


def _missing(frame: FrameType | None, nodes: int) -> str | None:
    """What a loop of Flower's waits for, if somewhere above `frame` there is one, and has not got."""
    for _ in range(_DEPTH):
        if frame is None:
            return None
        if frame.f_code.co_name == "sample_nodes" and str(frame.f_globals.get("__name__", "")).startswith("flwr."):
            wanted = frame.f_locals.get("min_available_nodes", 0)
            if not isinstance(wanted, int) or wanted <= nodes:
                return None
            strategy = None if frame.f_back is None else frame.f_back.f_locals.get("self")
            named = None if strategy is None else shortage(nodes, getattr(strategy, "__dict__", {}))
            return named or f"{wanted} nodes"
        frame = frame.f_back
    return None
