"""Fewer bytes for statistics: packing, float16, 8 bits, truncated eigenvectors; and which of these forms may arrive."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.state import State
from fedmerge.statistics.sending import codecs

__all__ = [
    "Compression",
    "Encoded",
    "bounded_bytes",
    "check_forms",
    "decode",
    "encode",
    "mean_diagonals",
    "shapes_of",
    "state_bytes",
]

Read = TypeVar("Read")
Compression = Literal["auto", "none", "float16", "int8"]


class Encoded(NamedTuple):
    """Tensors to send, and what was lost: the root mean square of the tensors' relative errors."""

    state: dict[str, Tensor]
    error: float


def encode(value: State, compression: Compression, budget: int) -> Encoded:
    """Bring a statistic into the form that is sent; :func:`decode` brings it back.

    Symmetric matrices travel as their upper triangle. ``"none"`` does no more than that; ``"float16"`` rounds
    it, relative to the diagonal, and one that is positive semi-definite comes back so. ``"int8"`` sends as many 8-bit
    eigenvectors of the symmetric matrices as fit into the budget, with the diagonal of what is left: 8-bit entries
    would make them indefinite, and a merge by them useless. Other tensors have 8 bits on a linear scale, or on a
    fourth-root scale where nothing is negative, as squares span many orders of magnitude.

    Parameters
    ----------
    value
        A statistic as it was measured.
    compression
        ``"auto"`` takes the first of the others, in this order, that fits into `budget`.
    budget
        Bytes. ``"none"`` and ``"float16"`` do not heed it; ``"int8"`` sends the diagonals at least.

    Examples
    --------
    >>> import torch
    >>> encode({"w": torch.eye(4)}, "none", 0).state["w#upper"].shape
    torch.Size([1, 10])
    """
    if compression == "auto":
        for level in ("none", "float16"):
            encoded = _encoded(value, level)
            if state_bytes(encoded) <= budget:
                return _judged(value, encoded)
    elif compression != "int8":
        return _judged(value, _encoded(value, compression))
    return _judged(value, _truncated(value, budget))


def decode(sent: State, check: Callable[[Mapping[str, tuple[int, ...]]], None] | None = None) -> dict[str, Tensor]:
    """A statistic back in the form that it was measured in.

    Parameters
    ----------
    sent
        What :func:`encode` gave, or says that it did.
    check
        Told the shapes of all tensors before any memory is taken for those that were packed, to refuse them.

    Raises
    ------
    InvalidOption
        Parts are missing or do not fit together.
    """
    parts = _parts(sent)
    if check is not None:
        check(_shapes(parts))
    return {
        name: pieces[""] if set(pieces) == {""} else _understood(name, pieces, codecs.decode)
        for name, pieces in parts.items()
    }


def shapes_of(sent: State) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what :func:`decode` would give, for as good as nothing.

    Raises
    ------
    InvalidOption
        Parts are missing or do not fit together.

    Examples
    --------
    >>> import torch
    >>> shapes_of(encode({"w": torch.eye(4)}, "float16", 0).state)
    {'w': (4, 4)}
    """
    return _shapes(_parts(sent))


def mean_diagonals(sent: State, names: Collection[str]) -> dict[str, float]:
    """Means of the diagonals of some matrices in `sent`, which are not unpacked for it.

    Examples
    --------
    >>> import torch
    >>> mean_diagonals(encode({"w": 2 * torch.eye(4)}, "float16", 0).state, {"w"})
    {'w': 2.0}
    """
    return {
        name: codecs.mean_diagonal(pieces if set(pieces) != {""} else pieces[""])
        for name, pieces in _parts(sent).items()
        if name in names
    }


def _parts(sent: State) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sent.items():
        name, mark, part = key.partition("#")
        parts.setdefault(name, {})[part if mark else ""] = tensor
    return parts


def _shapes(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    return {
        name: np.shape(pieces[""]) if set(pieces) == {""} else _understood(name, pieces, codecs.shape_of)
        for name, pieces in parts.items()
    }


def _understood(name: str, parts: Mapping[str, Tensor], read: Callable[[State], Read]) -> Read:
    try:
        return read(parts)
    except (LookupError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise InvalidOption(f"{name!r} came in parts {sorted(parts)} that do not fit together ({error})") from error


def state_bytes(state: State) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _encoded(value: State, level: str) -> dict[str, Tensor]:
    sent: dict[str, Tensor] = {}
    for name, tensor in value.items():
        for part, piece in codecs.encode(tensor, level).items():
            sent[f"{name}#{part}" if part else name] = piece
    return sent


def _truncated(value: State, budget: int) -> dict[str, Tensor]:
    """Eigenvectors in the order of their share of the trace per byte, over all matrices, until the budget is used."""
    rest = {name: tensor for name, tensor in value.items() if not codecs.is_symmetric(tensor)}
    sent = _encoded(rest, "int8")
    spectra = {name: codecs.spectrum(tensor) for name, tensor in value.items() if name not in rest}
    fixed = {name: 4 * s.vectors.shape[-1] * len(s.vectors) + 1 for name, s in spectra.items()}
    left = budget - state_bytes(sent) - sum(fixed.values())
    offers = []
    for name, s in spectra.items():
        groups, size, _ = s.vectors.shape
        cost = groups * (size + 4)
        shares = s.values.clamp_min(0).sum(0) / max(float(s.values.clamp_min(0).sum()), 1e-300)
        offers += [(share / cost, cost, name) for share in shares.tolist() if share > 0]
    ranks = dict.fromkeys(spectra, 0)
    for _, cost, name in sorted(offers, reverse=True):
        if cost > left:
            break
        ranks[name] += 1
        left -= cost
    for name, s in spectra.items():
        for part, piece in codecs.truncated(value[name], s, ranks[name]).items():
            sent[f"{name}#{part}"] = piece
    return sent


def _judged(value: State, sent: dict[str, Tensor]) -> Encoded:
    back = decode(sent)
    squares = []
    for name, tensor in value.items():
        norm = float(tensor.double().norm())
        if norm > 0:
            squares.append((float((back[name].double() - tensor.double()).norm()) / norm) ** 2)
    return Encoded(sent, math.sqrt(sum(squares) / len(squares)) if squares else 0.0)


_WIDE = None  # of the dtype that statistics are stored in
_NUMBER, _HALF, _BYTES = (torch.int8,), (torch.float16,), (torch.float32,)
_FORMS = {
    "none": ({"": _WIDE}, {"upper": _WIDE, "ndim": _NUMBER}),
    "float16": (
        {"linear": _HALF, "peak": _BYTES},
        {"root2": _HALF, "peak": _BYTES},
        {"correlation": _HALF, "diagonal": _BYTES, "ndim": _NUMBER},
    ),
    "int8": (
        {"linear": (torch.int8,), "peak": _BYTES},
        {"root4": (torch.uint8,), "peak": _BYTES},
        {"vectors": (torch.int8,), "peaks": _BYTES, "left": _BYTES, "ndim": _NUMBER},
    ),
}
_BY_RANK = ("vectors", "peaks")
"""What a budget may buy more or less of; the rest of an 8-bit form has the size that it has."""


def check_forms(sent: State, compression: Compression, stored: Collection[torch.dtype]) -> None:
    """Make sure that nothing is sent in more bytes than its form has: by its shapes a value is then as long as it is.

    Parameters
    ----------
    sent
        As it arrived.
    compression
        What clients were asked to do; under ``"auto"`` every form will do.
    stored
        Of which dtypes tensors may be that are not rounded.

    Raises
    ------
    InvalidOption
        A part of a tensor is missing, is one too many, or has another dtype.
    """
    parts: dict[str, dict[str, torch.dtype]] = {}
    for key, tensor in sent.items():
        name, mark, part = key.partition("#")
        if not mark and "" in parts.get(name, {}):
            raise InvalidOption(f"{name!r} came twice")
        parts.setdefault(name, {})[part] = tensor.dtype
    levels = ("none",) if compression == "none" else tuple(_FORMS)
    forms = [form for level in levels for form in _FORMS[level]]
    for name, dtypes in parts.items():
        fits = (
            set(form) == set(dtypes) and all(dtypes[part] in (form[part] or stored) for part in form) for form in forms
        )
        if not any(fits):
            listed = ", ".join(
                f"{part or 'whole'}: {str(dtype).removeprefix('torch.')}" for part, dtype in dtypes.items()
            )
            raise InvalidOption(f"{name!r} came in a form that nobody asked for ({listed})")


def bounded_bytes(sent: State) -> int:
    """Bytes of what a budget bounds: not of whole numbers, nor of what an 8-bit form cannot do without."""
    names = {key.partition("#")[0] for key in sent if key.endswith(("#vectors", "#root4"))}
    names |= {key.partition("#")[0] for key, t in sent.items() if key.endswith("#linear") and t.dtype == torch.int8}
    return sum(
        state_bytes({key: tensor})
        for key, tensor in sent.items()
        if ("#" in key or tensor.is_floating_point())
        and (key.partition("#")[0] not in names or key.partition("#")[2] in _BY_RANK)
    )
