"""Which clients' last replies were not merged, where clients keep tensors that go with the server's.

They are told with the next order, and go back to what they kept before. It is part of a strategy's memory, hence of
every checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from fedmerge.state import State

__all__ = ["keeping_missed", "missed_by", "noted"]

_MISSED = "missed/replies"
_WHOLE = 1 << 64  # numbers of nodes have 64 bits without a sign, those of tensors have one


def noted(memory: State, asked: Iterable[int], merged: Collection[int], round: int) -> dict[str, Tensor]:
    """Memory with the nodes of this round: the first round of which a node's reply was missed since one was merged.

    Examples
    --------
    >>> memory = noted({}, [7, 8], {7}, 3)
    >>> missed_by(noted(memory, [8], (), 5), [7, 8]), missed_by(noted(memory, [8], {8}, 5), [7, 8])
    (['8:3'], [])
    """
    missed = _missed(memory)
    for node in asked:
        if node in merged:
            missed.pop(node, None)
        else:
            missed.setdefault(node, round)
    kept = {name: tensor for name, tensor in memory.items() if name != _MISSED}
    rows = [[node - _WHOLE if node >= _WHOLE // 2 else node, first] for node, first in missed.items()]
    return {**kept, _MISSED: torch.tensor(rows, dtype=torch.int64)} if rows else kept


def keeping_missed(memory: State, before: State) -> dict[str, Tensor]:
    """A merge's memory, with what was known before it of replies that were missed."""
    return {**memory, **({_MISSED: before[_MISSED]} if _MISSED in before else {})}


def missed_by(memory: State, nodes: Iterable[int]) -> list[str]:
    """What to tell of these nodes, see :data:`~fedmerge.wire.keys.MISSED_KEY`."""
    missed = _missed(memory)
    return [f"{node}:{missed[node]}" for node in nodes if node in missed]


def _missed(memory: Mapping[str, Tensor]) -> dict[int, int]:
    rows = memory[_MISSED].tolist() if _MISSED in memory else []
    return {node % _WHOLE: first for node, first in rows}
