"""What a client keeps between two orders, in the ``state`` of its Flower Context, and finds there in the next one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedmerge.clients.group import Instructions
from fedmerge.errors import ModelError
from fedmerge.questions.stages import News, catch_up
from fedmerge.state import State
from fedmerge.wire.keys import SOURCES
from fedmerge.wire.record_values import from_arrays, to_arrays

__all__ = ["caught_up", "kept_buffers", "own_model", "remember"]

_BUFFERS = "fedmerge.merging.buffers"
_MODEL = "fedmerge.model"


def remember(kept: RecordDict, told: Instructions, state: State, buffers: Collection[str]) -> None:
    """Leave in `kept` what the order says is to be kept of the tensors in `state`, and no model where it says nothing.

    Parameters
    ----------
    kept
        The client's memory; changed in place.
    told
        The order.
    state
        All tensors of the client's model after training.
    buffers
        Names of those that are batch-norm statistics.
    """
    if told.keeps_buffers:
        kept[_BUFFERS] = to_arrays({name: tensor for name, tensor in state.items() if name in buffers})
    kept.pop(_MODEL, None)
    if told.keeps_model:
        kept[_MODEL] = to_arrays(state)


def kept_buffers(kept: RecordDict) -> dict[str, Tensor]:
    """The client's own batch-norm statistics; nothing before it has trained once."""
    return from_arrays(kept.array_records[_BUFFERS]) if _BUFFERS in kept else {}


def own_model(kept: RecordDict) -> dict[str, Tensor]:
    """The model that the client has kept.

    Raises
    ------
    ModelError
        It has kept nothing.
    """
    model = kept.array_records.get(_MODEL)
    if model is None:
        raise ModelError("the message is about the model that the client trained, and there is none in its Context")
    return from_arrays(model)


def caught_up(kept: RecordDict, brought: Mapping[str, ArrayRecord]) -> dict[str, Tensor]:
    """The kept model, brought up to date with what the message of a stage tells.

    Parameters
    ----------
    kept
        The client's memory.
    brought
        The tensors of the message, by the names of their records.

    Raises
    ------
    ModelError
        It has kept nothing, or another model than the message is about.
    """
    model, sources = own_model(kept), brought.get(SOURCES)
    if sources is None:
        raise ModelError("the message of a stage does not say how neurons were re-ordered")
    settled = next((record for key, record in brought.items() if key != SOURCES), ArrayRecord())
    moved = {}
    try:
        for key, index in from_arrays(sources).items():
            axis, _, name = key.partition(" ")
            moved[name, int(axis)] = index.long()
        return catch_up(model, News(from_arrays(settled), moved))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"the message of a stage cannot be read: {error}") from error
