"""Masks as they are sent and kept: one bit for each number of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmerge.errors import InvalidOption

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(mask: Tensor) -> Tensor:
    """A mask of n entries in ceil(n / 8) bytes, the first entry in the highest bit; those left over are zero.

    Parameters
    ----------
    mask
        Booleans, of any shape.

    Returns
    -------
    Tensor
        Bytes [ceil(n / 8)], of uint8.

    Examples
    --------
    >>> pack_bits(torch.tensor([[True, False], [False, True]]))
    tensor([144], dtype=torch.uint8)
    """
    bits = mask.reshape(-1).to(torch.uint8)
    bits = F.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    packed = torch.zeros(len(bits), dtype=torch.uint8, device=mask.device)
    for place in range(8):
        packed |= bits[:, place] << (7 - place)
    return packed


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask that :func:`pack_bits` made bytes of.

    Raises
    ------
    InvalidOption
        The bytes are not as many as a mask of this shape has.

    Examples
    --------
    >>> unpack_bits(torch.tensor([144], dtype=torch.uint8), (2, 2))
    tensor([[ True, False],
            [False,  True]])
    """
    count = prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != ((count + 7) // 8,):
        raise InvalidOption(
            f"a mask of shape {list(shape)} has {(count + 7) // 8} bytes, got {list(packed.shape)} of {packed.dtype}: "
            "unpack it with the shape of the tensor that it was made for"
        )
    bits = torch.stack([packed >> (7 - place) & 1 for place in range(8)], 1)
    return bits.view(-1)[:count].bool().reshape(tuple(shape))
