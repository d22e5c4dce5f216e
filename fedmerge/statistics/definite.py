"""Rounded correlation matrices made positive semi-definite again."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["definite", "is_definite"]

_EXACT = 1024
"""Largest matrix that is projected: beyond, eigenvectors take longer than all else that a merge does."""
_SINGLE = 2.0**-24  # half the spacing of float32 at 1
_SHIFTS = tuple(2.0**-k for k in range(16, 0, -1))


def is_definite(correlation: Tensor, slack: float) -> bool:
    """Whether no eigenvalue of symmetric matrices [groups, d, d] is below ``-slack``.

    Examples
    --------
    >>> is_definite(torch.ones(1, 2, 2), 1e-6), is_definite(torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]), 0.5)
    (True, False)
    """
    eye = torch.eye(correlation.shape[-1], dtype=torch.float64, device=correlation.device)
    found = torch.linalg.cholesky_ex(correlation.double() + slack * eye)
    return bool((found.info == 0).all())


def definite(correlation: Tensor) -> Tensor:
    """The nearest positive semi-definite matrices, in float64.

    Rounding moves every entry by up to 2**-12, and small eigenvalues of strongly correlated inputs lie far below that.
    The negative ones are cut off, which brings a matrix nearer to what it was before it was rounded, for that is
    positive semi-definite, and these matrices are a convex set; the diagonal gains a thousandth or so. Where
    eigenvectors take too long the diagonal is raised by no more than it takes instead.

    Parameters
    ----------
    correlation
        Symmetric, [groups, d, d], ones on the diagonal.

    Returns
    -------
    Tensor
        Of the same shape; still positive semi-definite once it is rounded to float32.

    Examples
    --------
    >>> definite(torch.tensor([[[1.0, 1.25], [1.25, 1.0]]])).round(decimals=4)
    tensor([[[1.1250, 1.1250],
             [1.1250, 1.1250]]], dtype=torch.float64)
    """
    matrix = correlation.double()
    size = matrix.shape[-1]
    floor = _SINGLE * size
    if is_definite(matrix, -floor):
        return matrix
    if size > _EXACT:
        return _shifted(matrix, floor)
    values, vectors = torch.linalg.eigh(matrix)
    cut: Tensor = (vectors * values.clamp_min(2 * floor)[..., None, :]) @ vectors.transpose(-1, -2)
    return cut


def _shifted(matrix: Tensor, floor: float) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    shift = next((one for one in _SHIFTS if is_definite(matrix, one - floor)), 1.0)
    return (matrix + shift * eye) / (1 + shift)
