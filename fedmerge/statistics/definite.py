"""Rounded correlation matrices made positive semi-definite again."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["INDEFINITE", "definite", "is_definite"]

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
    shift = next((one for one in _SHIFTS if is_definite(matrix, one - floor)), 1.0)
    return (matrix + shift * eye) / (1 + shift)
