"""Which nodes take part in a round: seeded, so that a run can be repeated."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from flwr.serverapp import Grid

from fedmerge.seeding import generator

__all__ = ["sample_nodes"]

log = logging.getLogger("fedmerge")


def sample_nodes(
    grid: Grid, fraction: float, at_least: int, min_available: int, *, seed: int, purpose: str, round: int
) -> list[int]:
    """Wait for enough nodes, then draw some of them without replacement, in order of their ids."""
    while True:
        known = grid.get_node_ids()
        # A range is in order already, and however many nodes it stands for, drawing from it costs what is drawn.
        nodes: Sequence[int] = known if isinstance(known, range) else sorted(known)
        size = max(int(len(nodes) * fraction), at_least)
        wanted = max(min_available, size)
        if len(nodes) >= wanted:
            break
        log.info("waiting for nodes: %d connected, %d wanted", len(nodes), wanted)
        time.sleep(1)
    if size == len(nodes):
        return list(nodes)
    drawn = generator(seed, purpose, round).choice(len(nodes), size=size, replace=False)
    return [nodes[i] for i in sorted(drawn)]
