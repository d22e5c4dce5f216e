"""Identities between the numbers of one statistic, by which sums that nobody can have measured are known.

Nobody has to say which task clients have, or which layer is the last: an identity that holds for nearly all clients'
sums is one of the task and the model, and has to hold for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Breach", "breaches", "cancelling", "labelled"]

_KEPT, _BROKEN = 0.01, 0.2
"""Errors, relative to the terms of an identity: compressed sums keep an identity to a hundredth, and what is off by a
fifth is no rounding. What lies between counts neither for an identity nor against a client."""
_STEPS = 127
"""Of a compressed tensor's numbers, from zero to the largest: smaller differences may be rounding."""


class Breach(NamedTuple):
    """How far numbers are from an identity, and how large the terms are that should cancel in it.

    With terms of size 0 the identity says nothing: a layer without gradient, a client without labels.
    """

    error: float
    size: float


def cancelling(tensor: Tensor) -> Breach:
    """How far rows are from adding up to zero, as they do where they are gradients by softmax logits.

    Examples
    --------
    >>> import torch
    >>> cancelling(torch.tensor([[1.0, -2.0], [-1.0, 2.0]])), cancelling(torch.ones(2, 2))
    (Breach(error=0.0, size=6.0), Breach(error=4.0, size=4.0))
    """
    numbers = tensor.double()
    return Breach(float(numbers.sum(0).abs().sum()), float(numbers.abs().sum()))


def labelled(second: Tensor, crossed: Tensor) -> Breach:
    """How far moments are from those of features h that end in a 1, with one-hot labels y.

    Then the rows of ``C = mean y h^T`` add up to the last row of ``S = mean h h^T``; the last column of C holds the
    classes' frequencies f; and, by Jensen, ``sum_c C_cj^2 / f_c <= S_jj``, which at the last feature is broken where a
    frequency is below 0. All this holds of classes that are weighted, too. Labels of one row are those of another task.
    Where all rows are shares of the last row of S, labels are the same whatever the features: numbers to be regressed
    on that happen to add up to 1 look like that, and say nothing.

    Parameters
    ----------
    second, crossed
        S [d, d] and C [classes, d].

    Examples
    --------
    >>> import torch
    >>> h, y = torch.tensor([[2.0, 1.0], [4.0, 1.0]]), torch.eye(2)
    >>> labelled(h.T @ h / 2, y.T @ h / 2)
    Breach(error=0.0, size=1.0)
    """
    s, c = second.double(), crossed.double()
    last, total = s[-1], c.sum(0)
    size = max(float(last.abs().sum()), float(total.abs().sum()))
    if len(c) < 2 or not size > 0:
        return Breach(0.0, 0.0)
    one_hot = float((last - total).abs().sum()) / size
    if not one_hot <= _BROKEN:  # the last feature is no 1, or the labels are not one-hot: nothing else is known
        return Breach(1.0, 1.0)
    shares = c @ last / last.square().sum()
    apart = float((c - shares[:, None] * last).norm() / c.norm())
    if one_hot <= _KEPT and apart <= _KEPT and int((shares > _KEPT).sum()) > 1 and not bool((shares < -_KEPT).any()):
        return Breach(0.0, 0.0)
    rounding = c.abs().max() / _STEPS
    frequency, diagonal = c[:, -1] + rounding, s.diagonal()
    least = (c.abs() - rounding).clamp_min(0)
    within = (least.square() / frequency.clamp_min(1e-12)[:, None])[frequency > 0].sum(0)
    unit = diagonal + 1e-3 * diagonal.mean()
    beyond = float(((within - diagonal) / unit.clamp_min(1e-300)).max())
    return Breach(max(one_hot, beyond, 0.0), 1.0)


def breaches(clients: Sequence[Mapping[str, Breach]], liars: int = 1) -> dict[int, str]:
    """Clients that break an identity which all others keep but `liars` at most: by place, the identity's name.

    An error counts by the size of the client's terms, or by the median client's where these are larger: what is left
    of a gradient after training may be rounding.

    Parameters
    ----------
    clients
        For each client, by name of the identity, how far it is from it.
    liars
        How many clients may lie. An identity that more of them break is none.

    Examples
    --------
    >>> kept, nearly, broken = Breach(0.0, 1.0), Breach(0.001, 1.0), Breach(0.9, 1.0)
    >>> breaches([{"sum": kept}, {"sum": nearly}, {"sum": broken}]), breaches([{"sum": kept}, {"sum": broken}])
    ({2: 'sum'}, {})
    """
    refused: dict[int, str] = {}
    for name in dict.fromkeys(name for each in clients for name in each):
        measured = {place: each.get(name, Breach(1.0, 1.0)) for place, each in enumerate(clients)}
        measured = {place: breach for place, breach in measured.items() if breach.size != 0}
        if not measured:
            continue
        usual = statistics.median(breach.size for breach in measured.values())
        errors = {place: breach.error / max(breach.size, usual) for place, breach in measured.items()}
        kept = sum(error <= _KEPT for error in errors.values())
        if kept >= len(errors) - liars and 2 * kept > len(errors):
            # NaN is broken too.
            refused |= {p: name for p, error in errors.items() if not error <= _BROKEN and p not in refused}
    return refused
