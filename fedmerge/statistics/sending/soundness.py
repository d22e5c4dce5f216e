"""Whether numbers that a client measured can be what they claim to be: finite, bounded, and of a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.state import LARGEST

__all__ = ["FIXED_POINT", "INDEFINITE", "definite", "is_definite", "semidefinite", "sound", "squares"]

INDEFINITE = 2.0**-8
"""Eigenvalues of a correlation matrix may lie below zero by this times ``sqrt(d)``: rounding of every entry to 8 bits
adds a matrix of noise, whose eigenvalues grow so (Wigner 1958)."""

_EXACT = 1024
"""Largest matrix that is projected: beyond, eigenvectors take longer than all else that a merge does."""
_SINGLE = 2.0**-24  # half the spacing of float32 at 1
_ROUNDED = 2.0**-12  # most that float16 moves a number below 1
_SHIFTS = tuple(2.0**-k for k in range(16, 0, -1))


def is_definite(correlation: Tensor, slack: float) -> bool:
    """Whether no eigenvalue of symmetric matrices [groups, d, d] is below ``-slack``.

    Examples
    --------
    >>> is_definite(torch.ones(1, 2, 2), 1e-6), is_definite(torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]), 0.5)
    (True, False)
    """
    shifted = correlation.to(torch.float64, copy=True)
    shifted.diagonal(dim1=-2, dim2=-1).add_(slack)
    return bool((torch.linalg.cholesky_ex(shifted).info == 0).all())


def definite(correlation: Tensor) -> Tensor:
    """Positive semi-definite matrices near rounded ones, in float64.

    Rounding moves every entry by up to 2**-12, so a matrix of noise is added, whose eigenvalues reach 2 sqrt(d)
    standard deviations, 2**-12 sqrt(4 d / 3), to either side (Wigner 1958). Where it made the matrix indefinite,
    eigenvalues within that reach are noise, the positive ones too, and are cut off: a merge that divides by them
    would take them for curvature. What is left is nearer to the matrix before rounding than the rounded one. Where
    eigenvectors take too long the diagonal is raised by no more than it takes instead.

    Parameters
    ----------
    correlation
        Symmetric, [groups, d, d], ones on the diagonal.

    Returns
    -------
    Tensor
        Of the same shape, in float64: rounded to float32, eigenvalues of zero would spread about zero again.

    Raises
    ------
    ValueError
        Eigenvalues lie further below zero than rounding can have put them, ``-INDEFINITE sqrt(d)``.

    Examples
    --------
    >>> definite(torch.tensor([[[1.0, 1.002], [1.002, 1.0]]])).round(decimals=4)
    tensor([[[1.0010, 1.0010],
             [1.0010, 1.0010]]], dtype=torch.float64)
    """
    matrix = correlation.double()
    size = matrix.shape[-1]
    floor = _SINGLE * size
    if is_definite(matrix, -floor):
        return matrix
    if not is_definite(matrix, INDEFINITE * size**0.5):
        raise ValueError("the correlations are those of no Gram matrix")
    if size > _EXACT:
        return _shifted(matrix, floor)
    values, vectors = torch.linalg.eigh(matrix)
    noise = _ROUNDED * (4 * size / 3) ** 0.5
    kept = torch.where(values > noise, values, _ROUNDED**4)
    cut: Tensor = (vectors * kept[..., None, :]) @ vectors.transpose(-1, -2)
    return cut


def _shifted(matrix: Tensor, floor: float) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    shift = next((share for share in _SHIFTS if is_definite(matrix, share - floor)), 1.0)
    return (matrix + shift * eye) / (1 + shift)


FIXED_POINT = 2.0**-30
"""Most that masked sums round: each client's to 2**-33, see :mod:`fedmerge.privacy.simulated_masks`."""

_SMALLEST = 2.0**-1022
"""Smallest normal number of float64: where the largest entry is nearer to zero, nothing was measured."""
_DENORMAL = 2.0**-147
"""How far an entry may be off besides, whatever its size: products of float32 numbers near zero lose their digits
there. A client that is sure of all its labels measures curvature as small as that."""
_ENTRY = 2.0**-7
"""How far one entry may be off, in units of what its diagonal allows: bfloat16 moves either of a pair by 2**-9."""
_FLOOR = 1e-6  # of the mean diagonal: float16 rounds what is below to zero


def sound(statistic: str, name: str, tensor: Tensor) -> Tensor:
    """One tensor of a statistic as real numbers in float32 or better, once it is known to be fit for sums.

    Raises
    ------
    InvalidOption
        It holds other things than real floating numbers, NaN or infinity, a number beyond
        :data:`~fedmerge.state.LARGEST`, as no model may, or nothing but numbers that float64 cannot hold precisely.

    Examples
    --------
    >>> sound("gram", "w", torch.ones(2, dtype=torch.float16)).dtype
    torch.float32
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise InvalidOption(f"statistic {statistic!r}: {name!r} is no dense tensor")
    if not tensor.is_floating_point():
        raise InvalidOption(f"statistic {statistic!r}: {name!r} is {tensor.dtype}, want real floating numbers")
    wide = tensor.detach().to(
        torch.promote_types(tensor.dtype, torch.float32) if tensor.itemsize > 1 else torch.float32
    )
    if not wide.numel():
        return wide
    low, high = (float(edge) for edge in torch.aminmax(wide))
    peak = max(-low, high)
    if not peak <= LARGEST:  # NaN is not either
        bad = int((~torch.isfinite(wide)).sum())
        problem = f"has {bad} of {wide.numel()} entries NaN or infinite" if bad else f"has entries beyond {LARGEST:g}"
        raise InvalidOption(f"statistic {statistic!r}: {name!r} {problem}")
    if 0 < peak < _SMALLEST:
        raise InvalidOption(f"statistic {statistic!r}: {name!r} has no entry beyond {peak:g}, which nothing measures")
    return wide


def squares(statistic: str, name: str, tensor: Tensor) -> Tensor:
    """:func:`sound` numbers that are means of squares.

    Raises
    ------
    InvalidOption
        They are not sound, or one is negative.
    """
    checked = sound(statistic, name, tensor)
    if checked.numel() and bool((checked < 0).any()):
        raise InvalidOption(f"statistic {statistic!r}: {name!r} has negative entries, and squares have none")
    return checked


def semidefinite(statistic: str, name: str, factor: Tensor, rounding: float = 0.0) -> Tensor:
    """Gram matrices [d, d] or [groups, d, d] as methods may use them: symmetric, without negative eigenvalues.

    All is judged in the units of the matrix itself: rows and columns are divided by the root of the diagonal, to which
    a millionth of its mean is added, so that rows of very different scales are judged alike. Then entries may be off by
    2**-7, be it from the entry across the diagonal or beyond 1, which is the most that two rows allow, and eigenvalues
    may lie below zero by ``2**-8 sqrt(d)``. So much comes of rounding every entry to 8 bits of precision; a matrix that
    is off by less, but by more than float32 rounds, comes back projected onto those that have no negative eigenvalue.

    Parameters
    ----------
    statistic, name
        What errors speak of.
    factor
        The matrices.
    rounding
        By how much entries may be off besides, whatever their size: :data:`FIXED_POINT` for what may travel so.

    Raises
    ------
    InvalidOption
        Numbers are not sound, the diagonal is negative, or the matrix is further from symmetric or positive
        semi-definite than that.

    Examples
    --------
    >>> semidefinite("gram", "w", torch.tensor([[1.0, 0.5], [0.5, 1.0]])).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    >>> semidefinite("gram", "w", torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    Traceback (most recent call last):
    fedmerge.errors.InvalidOption: statistic 'gram': 'w' is not positive semi-definite: an entry is 2 times what its \
diagonal allows
    """
    checked = sound(statistic, name, factor)
    if not checked.numel():
        return checked
    peak = float(checked.abs().max())
    if not peak:
        return checked
    grouped = (checked if checked.ndim == 3 else checked[None]) / peak
    rounding = max(rounding, _DENORMAL)
    if rounding / peak > _SINGLE:  # less is lost in what float32 rounds anyway
        grouped.diagonal(dim1=-2, dim2=-1).add_(rounding / peak * grouped.shape[-1] ** 0.5)
    diagonal = grouped.diagonal(dim1=-2, dim2=-1).double()
    if bool((diagonal < -_FLOOR * diagonal.abs().amax(-1, keepdim=True)).any()):
        raise InvalidOption(f"statistic {statistic!r}: {name!r} has a negative diagonal")
    scale = _scales(diagonal)
    inverse = (1 / scale).to(torch.float32)
    correlation = grouped.to(torch.float32) * inverse[..., :, None] * inverse[..., None, :]
    across = grouped.transpose(-1, -2)
    whole = torch.equal(grouped, across)
    if not whole and bool((correlation - correlation.transpose(-1, -2)).abs().max() > _ENTRY):
        raise InvalidOption(f"statistic {statistic!r}: {name!r} is not symmetric")
    most = float(correlation.abs().max())
    if not most <= 1 + _ENTRY:
        raise InvalidOption(
            f"statistic {statistic!r}: {name!r} is not positive semi-definite: an entry is {most:g} times what its "
            "diagonal allows"
        )
    size = correlation.shape[-1]
    if not whole:
        checked, grouped = (checked + checked.transpose(-1, -2)) / 2, (grouped + across) / 2
        correlation = (correlation + correlation.transpose(-1, -2)) / 2
    correlation.diagonal(dim1=-2, dim2=-1).add_(2 * _SINGLE * size)
    if bool((torch.linalg.cholesky_ex(correlation).info == 0).all()):
        return checked
    exact = grouped.double() / scale[..., :, None] / scale[..., None, :]
    if not is_definite(exact, INDEFINITE * size**0.5):
        raise InvalidOption(
            f"statistic {statistic!r}: {name!r} is not positive semi-definite: an eigenvalue lies below "
            f"-{INDEFINITE * size**0.5:.2g} times its diagonal"
        )
    values, vectors = torch.linalg.eigh(exact)
    mended = (vectors * values.clamp_min(0)[..., None, :]) @ vectors.transpose(-1, -2)
    mended = mended * scale[..., :, None] * scale[..., None, :] * (peak / 2)
    mended += mended.transpose(-1, -2).clone()
    whole_again: Tensor = mended.reshape(checked.shape)
    return whole_again  # in float64: rounded to float32, zeros would spread about zero again


def _scales(diagonal: Tensor) -> Tensor:
    """Roots of diagonals [groups, d] with the floor; as good as nothing where a group has none and must be all 0."""
    unit = diagonal.clamp_min(0).mean(-1, keepdim=True)
    return (diagonal.clamp_min(0) + _FLOOR * unit).sqrt().clamp_min(1e-15)
