"""How a round's clients are divided among workers, so that their number does not change the sums."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["divided", "serial_pieces"]

_PIECES = 64
"""Pieces of a round whose clients train one by one: whoever works at them, their sums are added in the same order."""


def serial_pieces(nodes: Sequence[int]) -> list[Sequence[int]]:
    """What is folded apart where clients train one by one.

    The pieces depend on the clients alone, so that any number of workers gives the same bits. Pieces of a single client
    add up as the stream of a server's messages does.
    """
    return divided(nodes, _PIECES)


def divided(nodes: Sequence[int], number: int) -> list[Sequence[int]]:
    """`nodes` in `number` runs of about equal length, none empty.

    Examples
    --------
    >>> divided([2, 3, 4], 2)
    [[2], [3, 4]]
    """
    number = min(number, len(nodes))
    ends = [len(nodes) * (i + 1) // number for i in range(number)]
    return [nodes[start:end] for start, end in zip([0, *ends], ends, strict=False)]
