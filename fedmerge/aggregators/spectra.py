"""Singular directions of a matrix, by the eigenvectors of its smaller Gram matrix in float64.

That costs a fraction of a full decomposition where a matrix is long, as kernels of convolutions are. It cannot tell
singular values apart that are below 1e-7 of the largest, and these are rounding in models of single precision.
Directions in which a matrix is zero up to rounding are left out: a decomposition fills them up with arbitrary ones.
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

__all__ = ["leading", "polar"]


def leading(matrix: Tensor, most: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix that are not zero, and their vectors, in float64.

    Parameters
    ----------
    matrix
        A matrix [m, n].
    most
        At most so many; all where not given.

    Returns
    -------
    tuple
        Left vectors [m, k], values [k] in descending order, right vectors [n, k].

    Examples
    --------
    >>> left, values, right = leading(torch.diag(torch.tensor([3.0, 0.0, 4.0])))
    >>> values
    tensor([4., 3.], dtype=torch.float64)
    """
    rounding = max(matrix.shape) * torch.finfo(matrix.dtype).eps
    matrix = matrix.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = _largest(matrix @ matrix.T if wide else matrix.T @ matrix, most)
    values = squares.clamp_min(0).sqrt().flip(0)
    number = int((values > max(rounding, 1e-7) * values[:1]).sum())
    values, vectors = values[:number], vectors[:, vectors.shape[1] - number :].flip(1)
    others = (matrix.T if wide else matrix) @ vectors / values
    return (vectors, values, others) if wide else (others, values, vectors)


def _largest(gram: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """The `most` largest eigenvalues, in ascending order, and their vectors in columns."""
    size = len(gram)
    if most is None or 2 * most > size or gram.device.type != "cpu":
        values, vectors = torch.linalg.eigh(gram)
        first = size - min(size, most or size)
        return values[first:], vectors[:, first:]
    # A third of the time, for the vectors of all others are never made.
    some = scipy.linalg.eigh(gram.numpy(), subset_by_index=[size - most, size - 1], driver="evr")
    return torch.from_numpy(some[0]), torch.from_numpy(some[1])


def polar(matrix: Tensor) -> Tensor:
    """The matrix nearest to `matrix` whose singular values are all one, but for those that are zero.

    Examples
    --------
    >>> polar(torch.tensor([[2.0, 0.0], [0.0, -0.5]])).float()
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    left, _, right = leading(matrix)
    return left @ right.T
