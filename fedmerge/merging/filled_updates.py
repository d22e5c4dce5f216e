"""Updates brought into the form of the model: what need not be sent is filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedmerge.adapters.low_rank_pairs import Pair, padded
from fedmerge.state import State
from fedmerge.update import ClientUpdate

__all__ = ["copied", "filled_up"]


def filled_up(update: ClientUpdate, pairs: Sequence[Pair], like: State, held: State) -> ClientUpdate:
    """The update with what a client need not send.

    Parameters
    ----------
    update
        As it came; what is wrong with it is told later.
    pairs, like
        Low-rank pairs, and their tensors in the model: one of smaller rank is one with slices of zeros.
    held
        Parameters that the method has clients hold still in this round.
    """
    if not isinstance(update.state, Mapping):
        return update
    return replace(update, state={**held, **padded(update.state, pairs, like)})


def copied(state: State) -> State:
    """A copy that outlives the block, whose memory is used again."""
    return {name: tensor.clone() for name, tensor in state.items()}
