"""Which nodes take part in a round: seeded, so that a run can be repeated."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.serverapp import Grid

from fedmerge.errors import InvalidOption
from fedmerge.seeding import generator
from fedmerge.strategies.participation import shortage, wanted

__all__ = ["check_nodes", "remedy", "sample_nodes"]

log = logging.getLogger("fedmerge")

_TELL_EVERY = 30  # seconds


def sample_nodes(
    grid: Grid, fraction: float, at_least: int, min_available: int, *, seed: int, purpose: str, round: int
) -> list[int]:
    """Wait for enough nodes, then draw some of them without replacement, in order of their ids.

    Whoever waits is told so now and then.
    """
    waited = 0
    while True:
        known = grid.get_node_ids()
        # A range is in order already, and however many nodes it stands for, drawing from it costs what is drawn.
        nodes: Sequence[int] = known if isinstance(known, range) else sorted(known)
        size, enough = wanted(len(nodes), fraction, at_least, min_available)
        if len(nodes) >= enough:
            break
        if waited % _TELL_EVERY == 0:
            log.warning(
                "round %d waits for nodes: %d connected, %d wanted: start the others, or lower the strategy's "
                "min_available_nodes, min_train_nodes and min_evaluate_nodes", round, len(nodes), enough,
            )  # fmt: skip
        time.sleep(1)
        waited += 1
    if size == len(nodes):
        return list(nodes)
    drawn = generator(seed, purpose, round).choice(len(nodes), size=size, replace=False)
    return [nodes[i] for i in sorted(drawn)]


def check_nodes(grid: Grid, settings: Mapping[str, Any]) -> None:
    """Make sure that a federation of which the number of nodes is known for good has enough of them.

    Raises
    ------
    InvalidOption
        It has fewer than `settings` ask for, and waiting would have no end.
    """
    most = getattr(grid, "most_nodes", None)
    if isinstance(most, int):
        kinds = tuple(kind for kind in ("train", "evaluate") if settings[f"fraction_{kind}"])
        missing = shortage(most, settings, kinds)
        if missing is not None:
            raise InvalidOption(remedy(most, missing))


def remedy(most: int, missing: str) -> str:
    """What is wrong with settings that a federation of `most` nodes cannot meet, and what to do."""
    nodes = "1 node" if most == 1 else f"{most} nodes"
    return (
        f"this federation has {nodes}, and no more will come, but the strategy waits for more: {missing}. "
        f"Lower these settings to at most {most} (fractions to at most 1), or simulate more clients"
    )
