"""What an edit is: a change of one client's update before the aggregator sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.edits.delta import Delta
from fedmerge.errors import InvalidOption
from fedmerge.seeding import torch_generator
from fedmerge.state import State, accumulator_dtype, prefixed
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

__all__ = ["Edit", "EditContext", "edited", "edited_rows", "memory_name", "remembered"]


@dataclass(frozen=True)
class EditContext:
    """What an edit may use besides the update.

    Parameters
    ----------
    client, round, seed
        Whose update it is, in which round, and the root of the merge's random streams.
    memory
        What :meth:`Edit.remembered` returned last round; empty in the first.
    place
        Position of the edit among those of the method, so that two of a kind draw different numbers.
    """

    client: int = 0
    round: int = 1
    seed: int = 0
    memory: State = field(default_factory=dict)
    place: int = 0

    def generator(self) -> torch.Generator:
        """The random stream of this edit for this client and round."""
        return torch_generator(self.seed, f"edit {self.place}", self.client, self.round)


class Edit(ABC):
    """Changes what one client's training did to the model: ``delta_i = theta_i - theta_0``.

    Subclasses are frozen dataclasses registered with :func:`fedmerge.registry.register`. An edit stands before the
    aggregator, ``dare(density=0.2)+ties``, and sees trained parameters only, of one client at a time: so it runs
    wherever sums over clients are taken.
    """

    kind: ClassVar[str] = "edit"

    @property
    def tensor_by_tensor(self) -> bool:
        """Whether it changes each tensor without a look at the others, and draws nothing at random."""
        return False

    @property
    def linearises(self) -> tuple[str, ...]:
        """Patterns of parameters in which the edit wants the model linearised, while clients train and ever after."""
        return ()

    @property
    def remembers(self) -> bool:
        """Whether it has memory between rounds. The server keeps it, so sums over clients are then taken there."""
        return False

    @abstractmethod
    def edit(self, delta: State, context: EditContext) -> State:
        """The update to merge instead.

        Parameters
        ----------
        delta
            Trained minus sent parameters, in float32 or better; its tensors may not be changed. A tensor may be
            computed anew each time that it is looked at.
        context
            Whose update it is, and the random stream for it.
        """

    def remembered(self, step: State, memory: State) -> State:
        """Memory for the next round, where :attr:`remembers`; `step` is what the aggregator moved the model by."""
        return {}


def edited(
    edits: Sequence[Edit], update: ClientUpdate, context: MergeContext, memory: State | None = None
) -> ClientUpdate:
    """The update with all edits made, one after the other.

    Raises
    ------
    InvalidOption
        Nobody knows the model that clients started from, or the client's has other widths.
    """
    base = _base(edits, context)
    for name, tensor in update.state.items():
        if tensor.shape != base[name].shape:
            raise InvalidOption(
                f"{type(edits[0]).__name__} edits updates number by number, and {name!r} of client {update.client} has "
                f"shape {list(tensor.shape)}, in the model sent {list(base[name].shape)}: "
                "leave it out where widths differ"
            )
    delta: State = Delta(update.state, base)
    for place, edit in enumerate(edits):
        kept = prefixed(memory_name(place), memory or {})
        delta = edit.edit(delta, EditContext(update.client, context.round, context.seed, kept, place))
    changes = dict(delta)
    del delta
    # Taken out one by one, so that edited changes and the edited model never stand beside each other as a whole.
    return replace(update, state={name: base[name] + changes.pop(name) for name in list(changes)})


def edited_rows(edits: Sequence[Edit], block: StackedUpdates, context: MergeContext) -> StackedUpdates:
    """A block of clients that trained stacked, each row edited by itself, as it would be if it came alone."""
    states = [edited(edits, update, context).state for update in block]
    stacked: dict[str, Tensor] = {name: torch.stack([state[name] for state in states]) for name in block.states}
    return replace(block, states=stacked)


def remembered(edits: Sequence[Edit], merged: State, context: MergeContext, memory: State) -> dict[str, Tensor]:
    """Memory of all edits for the next round, after `merged` came of their clients' updates."""
    if not any(edit.remembers for edit in edits):
        return {}
    base = _base(edits, context)
    # A layer that grew in the merge took no step that the next update could be held against.
    stayed = {name: tensor for name, tensor in merged.items() if tensor.shape == base[name].shape}
    step = {name: t.to(accumulator_dtype(t.dtype)) - base[name] for name, t in stayed.items()}
    kept: dict[str, Tensor] = {}
    for place, edit in enumerate(edits):
        own = edit.remembered(step, prefixed(memory_name(place), memory))
        kept |= {f"{memory_name(place)}/{name}": tensor for name, tensor in own.items()}
    return kept


def memory_name(place: int) -> str:
    """Under which prefix the pipeline's memory holds that of an edit."""
    return f"edit{place}"


def _base(edits: Sequence[Edit], context: MergeContext) -> State:
    if context.base is None:
        raise InvalidOption(
            f"{type(edits[0]).__name__} edits what training did to the model all clients started from: pass base=."
        )
    return context.base
