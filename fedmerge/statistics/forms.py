"""The forms in which a statistic may arrive: those that :func:`~fedmerge.statistics.compression.encode` makes."""

from __future__ import annotations

from collections.abc import Collection

import torch

from fedmerge.errors import InvalidOption
from fedmerge.state import State
from fedmerge.statistics.compression import Compression, state_bytes

__all__ = ["bounded_bytes", "check_forms"]

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
    for name, found in parts.items():
        fits = (
            set(form) == set(found) and all(found[part] in (form[part] or stored) for part in form) for form in forms
        )
        if not any(fits):
            told = ", ".join(f"{part or 'whole'}: {str(dtype).removeprefix('torch.')}" for part, dtype in found.items())
            raise InvalidOption(f"{name!r} came in a form that nobody asked for ({told})")


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
