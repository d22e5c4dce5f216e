"""How one tensor of a statistic is written in fewer bytes, and read back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedmerge.statistics.sending.soundness import definite, is_definite

__all__ = ["Spectrum", "decode", "encode", "is_symmetric", "mean_diagonal", "shape_of", "spectrum", "truncated"]

_FORMS = frozenset(
    frozenset(parts.split())
    for parts in (
        "peak linear", "peak root2", "peak root4", "vectors peaks left ndim", "correlation diagonal ndim", "upper ndim",
    )
)  # fmt: skip
_ROUNDING = 2.0**-11
"""Eigenvalues of a correlation matrix this far below zero are more than rounding."""


class Spectrum(NamedTuple):
    """Eigenvalues [groups, d], largest first, and eigenvectors [groups, d, d] as columns."""

    values: Tensor
    vectors: Tensor


def is_symmetric(tensor: Tensor) -> bool:
    """Whether a tensor is a symmetric matrix [d, d], or several [groups, d, d]."""
    if tensor.ndim not in (2, 3) or tensor.shape[-1] != tensor.shape[-2] or not tensor.is_floating_point():
        return False
    return tensor.numel() > 0 and bool((tensor - tensor.transpose(-1, -2)).abs().max() <= 1e-5 * tensor.abs().max())


def encode(tensor: Tensor, level: str) -> dict[str, Tensor]:
    """Parts of a tensor by name, ``""`` for the tensor itself, at level none, float16 or int8.

    The last is for tensors that are no symmetric matrices: for these there is :func:`truncated`.
    """
    if is_symmetric(tensor) and level != "int8":
        # Half of a matrix that is symmetric to rounding only would not be all of it.
        whole = level == "none" and not torch.equal(tensor, tensor.transpose(-1, -2))
        return {"": tensor} if whole else _symmetric(tensor, level)
    if level == "none" or not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        return {"": tensor}
    peak = tensor.abs().max().float() if tensor.numel() else torch.zeros(())
    scaled = tensor.float() / peak.clamp_min(1e-38)
    if bool((tensor < 0).any()):
        return {"linear": (scaled * 127).round().to(torch.int8) if level == "int8" else scaled.half(), "peak": peak}
    if level == "float16":
        return {"root2": scaled.sqrt().half(), "peak": peak}
    return {"root4": (scaled.sqrt().sqrt() * 255).round().to(torch.uint8), "peak": peak}


def _symmetric(tensor: Tensor, level: str) -> dict[str, Tensor]:
    matrix = tensor if tensor.ndim == 3 else tensor[None]
    finite = bool(torch.isfinite(matrix).all())
    if level == "none" or not finite:
        return {"upper": _upper(matrix), "ndim": torch.tensor(tensor.ndim, dtype=torch.int8)}
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).float()
    scale = diagonal.double().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    correlation = _upper(matrix * inverse[..., :, None] * inverse[..., None, :], 1).clamp(-1, 1)
    whole = _from_upper(correlation, matrix.shape[-1], 1) + _ones_on(matrix)
    # What noise has made indefinite is sent so, or sums over clients would be off.
    axes = tensor.ndim if is_definite(whole, _ROUNDING) else -tensor.ndim
    return {"correlation": correlation.half(), "diagonal": diagonal, "ndim": torch.tensor(axes, dtype=torch.int8)}


def _ones_on(matrix: Tensor) -> Tensor:
    """The identity of the size of matrices [..., d, d]."""
    return torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)


def _upper(matrix: Tensor, offset: int = 0) -> Tensor:
    rows, columns = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], offset)
    return matrix[..., rows, columns]


def _from_upper(packed: Tensor, size: int, offset: int = 0) -> Tensor:
    rows, columns = torch.triu_indices(size, size, offset)
    matrix = packed.new_zeros(*packed.shape[:-1], size, size)
    matrix[..., rows, columns] = packed
    matrix[..., columns, rows] = packed
    return matrix


def spectrum(tensor: Tensor) -> Spectrum:
    """Eigenvalues and eigenvectors of a symmetric tensor."""
    values, vectors = torch.linalg.eigh(tensor.double() if tensor.ndim == 3 else tensor[None].double())
    return Spectrum(values.flip(-1), vectors.flip(-1))


def truncated(tensor: Tensor, eigen: Spectrum, rank: int) -> dict[str, Tensor]:
    """``sum_k s_k v_k v_k^T`` of the largest eigenvalues, v_k in 8 bits, and the diagonal of what is left."""
    matrix = tensor.double() if tensor.ndim == 3 else tensor[None].double()
    vectors = eigen.vectors[..., :rank] * eigen.values[..., None, :rank].clamp_min(0).sqrt()
    peaks = vectors.abs().amax(-2).float() if rank else vectors.new_zeros(len(vectors), 0).float()
    written = (vectors / peaks.double().clamp_min(1e-300)[..., None, :] * 127).round().to(torch.int8)
    read = _columns(written, peaks).double()
    left = (matrix - read @ read.transpose(-1, -2)).diagonal(dim1=-2, dim2=-1).clamp_min(0).float()
    return {"vectors": written, "peaks": peaks, "left": left, "ndim": torch.tensor(tensor.ndim, dtype=torch.int8)}


def _columns(written: Tensor, peaks: Tensor) -> Tensor:
    return written.float() / 127 * peaks[..., None, :]


def shape_of(parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of what :func:`decode` makes of `parts`, which may be far larger than they are.

    Raises
    ------
    ValueError, KeyError
        They do not fit together.
    """
    if frozenset(parts) not in _FORMS:
        raise ValueError("nothing is written in such parts")
    if any(tensor.is_complex() or tensor.dtype == torch.bool for tensor in parts.values()):
        raise ValueError("a part holds no real numbers")
    if "peak" in parts:
        if parts["peak"].ndim:
            raise ValueError("the peak is no single number")
        (written,) = (tensor for part, tensor in parts.items() if part in ("linear", "root2", "root4"))
        return tuple(written.shape)
    if "vectors" in parts:
        groups, size, rank = parts["vectors"].shape
        fits = parts["peaks"].shape == (groups, rank) and parts["left"].shape == (groups, size)
    elif "correlation" in parts:
        groups, size = parts["diagonal"].shape
        fits = parts["correlation"].shape == (groups, size * (size - 1) // 2)
    else:
        groups, packed = parts["upper"].shape
        size = (math.isqrt(8 * packed + 1) - 1) // 2
        fits = packed == size * (size + 1) // 2
    axes = int(parts["ndim"])
    axes = abs(axes) if "correlation" in parts else axes
    if not fits or axes not in (2, 3) or (axes == 2 and groups != 1):
        raise ValueError("their shapes belong to no symmetric matrices")
    return (groups, size, size)[3 - axes :]


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    """The tensor that :func:`encode` or :func:`truncated` wrote as `parts`.

    Raises
    ------
    ValueError
        It wrote no such parts: sizes that are negative, correlations that are none.
    """
    for part in ("peak", "peaks", "left", "diagonal"):
        if part in parts and bool((parts[part] < 0).any()):
            raise ValueError(f"its {part} is negative")
    if "peak" in parts:
        peak = parts["peak"]
        if "linear" in parts:
            written = parts["linear"]
            return peak * (written.float() / 127 if written.dtype == torch.int8 else written.float())
        if "root2" in parts:
            return peak * parts["root2"].float().square()
        return peak * (parts["root4"].float() / 255).square().square()
    if "vectors" in parts:
        columns = _columns(parts["vectors"], parts["peaks"])
        matrix = columns @ columns.transpose(-1, -2) + torch.diag_embed(parts["left"])
    elif "correlation" in parts:
        matrix = _from_correlation(parts["correlation"], parts["diagonal"], rounded=int(parts["ndim"]) > 0)
    else:
        packed = parts["upper"]
        size = (math.isqrt(8 * packed.shape[-1] + 1) - 1) // 2
        matrix = _from_upper(packed, size)
    return matrix[0] if abs(int(parts["ndim"])) == 2 else matrix


def _from_correlation(packed: Tensor, diagonal: Tensor, *, rounded: bool) -> Tensor:
    """A matrix with about this diagonal; positive semi-definite where it was so before it was `rounded`."""
    size = diagonal.shape[-1]
    if bool((packed.abs() > 1).any()):
        raise ValueError("correlations lie between -1 and 1")
    correlation = _from_upper(packed.double(), size, 1)
    correlation = correlation + _ones_on(correlation)
    mended = definite(correlation) if rounded and bool(packed.isfinite().all()) else correlation
    scale = diagonal.double().clamp_min(0).sqrt()
    matrix = mended * scale[..., :, None] * scale[..., None, :]
    if mended is not correlation:
        return matrix  # in float64: what was cut off would come back as rounding of float32
    matrix = matrix.float()
    on = matrix.diagonal(dim1=-2, dim2=-1)
    on.copy_(torch.where(correlation.diagonal(dim1=-2, dim2=-1) == 1, diagonal, on))
    return matrix


def mean_diagonal(written: Tensor | Mapping[str, Tensor]) -> float:
    """The mean of the diagonal of symmetric matrices, as they are or in the parts that :func:`encode` wrote.

    Raises
    ------
    ValueError
        They are of no real floating numbers.
    """
    if isinstance(written, Tensor):
        if not written.is_floating_point():
            raise ValueError(f"{written.dtype} is no type of a matrix")
        diagonal = written.diagonal(dim1=-2, dim2=-1).double()
    elif "vectors" in written:
        diagonal = _columns(written["vectors"], written["peaks"]).double().square().sum(-1) + written["left"]
    elif "diagonal" in written:
        diagonal = written["diagonal"].double()
    else:
        size = (math.isqrt(8 * written["upper"].shape[-1] + 1) - 1) // 2
        places = torch.arange(size)  # row i begins where the i rows before it, each one shorter, end
        diagonal = written["upper"][..., places * size - places * (places - 1) // 2].double()
    return float(diagonal.mean()) if diagonal.numel() else 0.0
