"""What makes a client's own model of the shared one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.personal.packed_bits import unpack_bits
from fedmerge.state import State, accumulator_dtype, prefixed

__all__ = ["PersonalPart", "parts_in", "personalise", "remembered_parts"]

_PREFIX = "personal"


@dataclass(frozen=True)
class PersonalPart:
    """One client's mask and number: ``theta_i = theta_0 + scale * mask * (theta - theta_0)``.

    Parameters
    ----------
    client
        Whose it is.
    packed
        The mask of each parameter, one bit a number, see :func:`~fedmerge.personal.pack_bits`.
    scale
        The number.

    Examples
    --------
    >>> part = PersonalPart(0, {"w": torch.tensor([0b10000000], dtype=torch.uint8)}, 2.0)
    >>> part.of({"w": torch.tensor([1.5, 9.0])}, {"w": torch.tensor([1.0, 1.0])})["w"], part.bytes
    (tensor([2., 1.]), 9)
    """

    client: int
    packed: State
    scale: float

    @property
    def bytes(self) -> int:
        """What it takes to send it to a client that knows both models: the masks, and eight for the number."""
        return sum(packed.numel() for packed in self.packed.values()) + 8

    def of(self, state: State, base: State, tied: Mapping[str, str] | None = None) -> dict[str, Tensor]:
        """The client's model, see :func:`personalise`."""
        masks = {name: unpack_bits(bits, state[name].shape) for name, bits in self.packed.items() if name in state}
        missing = sorted(self.packed.keys() - masks.keys())
        if missing:
            raise InvalidOption(f"the mask of client {self.client} is for {missing[0]!r}, which the model lacks")
        return personalise(state, base, masks, self.scale, tied)


def personalise(
    state: State, base: State, mask: State, scale: float = 1.0, tied: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """``theta_0 + scale * mask * (theta - theta_0)``, tensor by tensor; what has no mask is the shared model's.

    Parameters
    ----------
    state
        theta, the shared model.
    base
        theta_0, the model that clients started from.
    mask
        Booleans by the names of parameters, each of its parameter's shape.
    scale
        By which the masked change is multiplied.
    tied
        By further names of shared parameters, their first, which has the mask.

    Returns
    -------
    dict
        A new state; tensors without a mask are those of `state`.

    Raises
    ------
    InvalidOption
        A mask is for no tensor of both states, or not of its shape.

    Examples
    --------
    >>> shared, start = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.zeros(2)}
    >>> personalise(shared, start, {"w": torch.tensor([True, False])}, 0.5)["w"]
    tensor([0.5000, 0.0000])
    """
    own = dict(state)
    for name, kept in mask.items():
        for holder, states in (("state", state), ("base", base)):
            if name not in states or states[name].shape != kept.shape:
                other = f"is {list(states[name].shape)}" if name in states else "is missing"
                raise InvalidOption(
                    f"the mask of {name!r} is {list(kept.shape)}, and that tensor of {holder} {other}: personalise the "
                    "model that the mask was made for"
                )
        start = base[name].to(accumulator_dtype(base[name].dtype))
        moved = torch.where(kept, (state[name] - start) * scale, 0.0)
        own[name] = (start + moved).to(state[name].dtype)
    return own | {alias: own[name] for alias, name in (tied or {}).items() if name in mask and alias in state}


def remembered_parts(parts: Iterable[PersonalPart]) -> dict[str, Tensor]:
    """Personal parts as an aggregator returns them: with its memory, so that a checkpoint saves them.

    Examples
    --------
    >>> part = PersonalPart(7, {"w": torch.tensor([128], dtype=torch.uint8)}, 2.0)
    >>> sorted(remembered_parts([part]))
    ['personal/7/mask/w', 'personal/7/scale']
    """
    memory = {}
    for part in parts:
        memory[f"{_PREFIX}/{part.client}/scale"] = torch.tensor(part.scale, dtype=torch.float64)
        memory |= {f"{_PREFIX}/{part.client}/mask/{name}": packed for name, packed in part.packed.items()}
    return memory


def parts_in(memory: State) -> dict[int, PersonalPart]:
    """The personal parts in an aggregator's memory, by client in ascending order; none where it makes none.

    Examples
    --------
    >>> part = PersonalPart(7, {"w": torch.tensor([128], dtype=torch.uint8)}, 2.0)
    >>> parts_in(remembered_parts([part]))[7].scale
    2.0
    """
    held = prefixed(_PREFIX, memory)
    clients = sorted(int(name.partition("/")[0]) for name in held if name.endswith("/scale") and name.count("/") == 1)
    return {
        client: PersonalPart(client, prefixed(f"{client}/mask", held), float(held[f"{client}/scale"]))
        for client in clients
    }
