"""What Flower tells nobody, and is read from the frames of its callers: the only place where that is done.

Two facts decide whether a run is sound, and flwr hands neither of them on:

- Its wrappers for differential privacy call the strategy within them as anybody would. By the time that replies arrive
  they have clipped all that these hold, statistics included, so the strategy within has to know before it asks.
- Its strategies ask a grid for its nodes in a loop that ends once there are enough, and do not say how many they want.
  On a grid that has all the nodes it will ever have, that loop would not end.

Where flwr changes its loop or its wrappers, both functions find nothing, and nobody is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from types import FrameType

from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

from fedmerge.strategies.participation import shortage

__all__ = ["missing_nodes", "privacy_wrapper"]

_WRAPPERS = (
    DifferentialPrivacyServerSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyClientSideAdaptiveClipping,
)
_DEPTH = 9
"""Frames between a strategy of Flower's and whoever asks: its function, a grid, and the grids around that one."""


def _callers() -> Iterator[FrameType]:
    """The frames above whoever asks, the nearest first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def privacy_wrapper() -> str | None:
    """Name of Flower's differential-privacy wrapper that is calling the strategy within it, if one is."""
    for frame in _callers():
        caller = frame.f_locals.get("self")
        if isinstance(caller, _WRAPPERS):
            return type(caller).__name__
    return None


def missing_nodes(nodes: int) -> str | None:
    """What a loop of Flower's waits for that is asking now, if there is one, and `nodes` nodes are not enough for it.

    Returns
    -------
    str or None
        The strategy's settings that want more, in words.
    """
    for frame in islice(_callers(), _DEPTH):
        if frame.f_code.co_name == "sample_nodes" and str(frame.f_globals.get("__name__", "")).startswith("flwr."):
            wanted = frame.f_locals.get("min_available_nodes", 0)
            if not isinstance(wanted, int) or wanted <= nodes:
                return None
            strategy = None if frame.f_back is None else frame.f_back.f_locals.get("self")
            named = None if strategy is None else shortage(nodes, getattr(strategy, "__dict__", {}))
            return named or f"{wanted} nodes"
    return None
