"""Sums of low-rank updates without their full matrices: bases of stacked factors, and small cores between them.

``sum_i c_i B_i A_i`` lies in the span of the columns of all B_i and the rows of all A_i. In bases of these it is a
small matrix, the core, of at most ``sum_i r_i`` rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.errors import AdapterError

__all__ = ["Basis", "Cores", "Term", "balanced", "best_of_rank", "norm_of_sum", "total"]

_BLOCK = 1 << 14  # rows that are worked on in float64 at once
_LOST = 1e-14  # of squared lengths, in float64: 1e-7 of lengths, near what float32 holds


@dataclass(frozen=True, eq=False)
class Term:
    """One summand ``weight * b a``.

    Parameters
    ----------
    b, a
        [out, r] and [r, in].
    weight
        c.
    """

    b: Tensor
    a: Tensor
    weight: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return len(self.a)


class Basis:
    """An orthonormal basis of the columns of several matrices [d, r_i], which are its coordinates times it.

    The basis itself, [d, k], is not formed: it is a product of the matrices with a small one, from the eigenvectors of
    their Gram matrix in float64. Columns are brought to one length before, so that short ones count.

    Parameters
    ----------
    blocks
        The matrices; not changed.

    Examples
    --------
    >>> one, two = torch.eye(3)[:, :1], torch.ones(3, 1)
    >>> basis = Basis([one, two])
    >>> basis.size, bool((basis.lift(basis.coordinates(1)) - two).abs().max() < 1e-6)
    (2, True)
    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._blocks = list(blocks)
        self._sizes = [block.shape[1] for block in blocks]
        gram = self._gram()
        lengths = gram.diagonal().clamp(min=0).sqrt()
        lengths = torch.where(lengths > 0, lengths, 1.0)
        values, vectors = torch.linalg.eigh(gram / lengths / lengths[:, None])
        kept = values > _LOST * max(float(values.max()), 0.0) if len(values) else values > 0
        roots, vectors = values[kept].flip(0).sqrt(), vectors[:, kept].flip(1)
        self._coordinates = roots[:, None] * vectors.T * lengths
        self._lift = vectors / roots / lengths[:, None]

    @property
    def size(self) -> int:
        """k, the number of directions."""
        return len(self._coordinates)

    def coordinates(self, number: int) -> Tensor:
        """[k, r_i] of one of the matrices, in float64."""
        parts: tuple[Tensor, ...] = self._coordinates.split(self._sizes, 1)
        return parts[number]

    def lift(self, inner: Tensor) -> Tensor:
        """The basis times a matrix [k, m]: [d, m], in the type of the matrices."""
        weights = self._lift @ inner.to(self._lift)
        first = self._blocks[0]
        result = first.new_empty(len(first), weights.shape[1])
        for rows in self._rows():
            result[rows] = (self._stacked(rows) @ weights).to(result.dtype)
        return result

    def _gram(self) -> Tensor:
        width = sum(self._sizes)
        gram = torch.zeros(width, width, dtype=torch.float64, device=self._blocks[0].device)
        for rows in self._rows():
            piece = self._stacked(rows)
            gram.addmm_(piece.T, piece)
        return gram

    def _rows(self) -> list[slice]:
        return [slice(start, start + _BLOCK) for start in range(0, len(self._blocks[0]), _BLOCK)]

    def _stacked(self, rows: slice) -> Tensor:
        return torch.cat([block[rows].to(torch.float64) for block in self._blocks], 1)


class Cores:
    """Low-rank updates as small matrices between two common bases: nothing of them is lost.

    Parameters
    ----------
    terms
        The updates; their weights do not count here.

    Raises
    ------
    AdapterError
        They are none, or of unequal shapes.

    Examples
    --------
    >>> terms = [Term(torch.ones(3, 1), torch.ones(1, 4)), Term(torch.eye(3)[:, :1], torch.ones(1, 4))]
    >>> cores = Cores(terms)
    >>> cores.of(0).shape, bool((torch.mm(*cores.factors(cores.of(0), 1)) - 1).abs().max() < 1e-6)
    (torch.Size([2, 1]), True)
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        shapes = {(len(term.b), term.a.shape[1]) for term in terms}
        if len(shapes) != 1:
            raise AdapterError(
                f"low-rank updates of shapes {sorted(shapes)} have no sum: want one shape, of one or more"
            )
        self._terms = list(terms)
        self.left = Basis([term.b for term in terms])
        self.right = Basis([term.a.T for term in terms])

    def of(self, number: int) -> Tensor:
        """One update's core [k, l], in float64: ``b a`` between the bases."""
        return self.left.coordinates(number) @ self.right.coordinates(number).T

    def sum(self) -> Tensor:
        """The core of ``sum_i c_i b_i a_i``."""
        start = torch.zeros(self.left.size, self.right.size, dtype=torch.float64, device=self._terms[0].b.device)
        return sum((term.weight * self.of(i) for i, term in enumerate(self._terms)), start)

    def factors(self, core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The best B [out, rank] and A [rank, in] of a core: ``U S`` and ``V^T`` of its largest singular values.

        Where the core has fewer, B is zero, and A goes on with further directions in which the updates' A lie, so
        that training can go on from there.
        """
        left, values, right = torch.linalg.svd(core, full_matrices=True)
        number = min(rank, len(values))
        b = self.left.lift(left[:, :number] * values[:number])
        a = self.right.lift(right[:rank].T).T
        fill_b, fill_a = rank - b.shape[1], rank - len(a)
        return torch.cat([b, b.new_zeros(len(b), fill_b)], 1), torch.cat([a, a.new_zeros(fill_a, a.shape[1])])


def best_of_rank(terms: Sequence[Term], rank: int) -> tuple[Tensor, Tensor]:
    """B [out, rank] and A [rank, in] whose product is nearest to ``sum_i c_i b_i a_i``.

    B is ``U S`` and A is ``V^T`` of the sum's singular value decomposition (Eckart and Young 1936); what is lost are
    its further singular values.

    Raises
    ------
    AdapterError
        There is no term, or they have unequal shapes.

    Examples
    --------
    >>> terms = [Term(torch.ones(3, 1), torch.ones(1, 2), 0.25), Term(torch.ones(3, 1), torch.ones(1, 2), 0.75)]
    >>> b, a = best_of_rank(terms, 2)
    >>> bool((b @ a - 1).abs().max() < 1e-6)
    True
    """
    cores = Cores(terms)
    return cores.factors(cores.sum(), rank)


def norm_of_sum(terms: Sequence[Term]) -> float:
    """Frobenius norm of ``sum_i c_i b_i a_i``.

    Examples
    --------
    >>> round(norm_of_sum([Term(torch.ones(2, 1), torch.ones(1, 2)), Term(torch.ones(2, 1), -torch.ones(1, 2))]), 6)
    0.0
    """
    return float(torch.linalg.matrix_norm(Cores(terms).sum())) if terms else 0.0


def total(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """The sum as one pair of rank ``sum_i r_i``: stacked factors, the weights in B (FLoRA, arXiv:2409.05976).

    Examples
    --------
    >>> b, a = total([Term(torch.ones(2, 1), torch.ones(1, 2), 0.5), Term(torch.ones(2, 1), torch.ones(1, 2), 1.5)])
    >>> (b @ a).tolist()
    [[2.0, 2.0], [2.0, 2.0]]
    """
    return torch.cat([term.b * term.weight for term in terms], 1), torch.cat([term.a for term in terms])


def balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with each column of B as long as the row of A that it goes with; zeros stay as they are.

    Examples
    --------
    >>> b, a = balanced(torch.tensor([[8.0]]), torch.tensor([[2.0]]))
    >>> b.item(), a.item()
    (4.0, 4.0)
    """
    columns, rows = b.norm(dim=0), a.norm(dim=1)
    ratio = torch.where((columns > 0) & (rows > 0), (rows / columns).sqrt(), 1.0)
    return b * ratio, a / ratio[:, None]
