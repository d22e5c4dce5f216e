"""Identities between the numbers of one statistic, by which sums that nobody can have measured are known.

Nobody has to say which task clients have, or which layer is the last: an identity that holds for most clients' sums is
one of the task and the model, and has to hold for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["breaches", "cancelling", "labelled"]

_KEPT, _BROKEN = 0.01, 0.2
"""Errors, relative to the terms of an identity: compressed sums keep an identity to a hundredth, and what is off by a
fifth is no rounding. What lies between counts neither for an identity nor against a client."""


def cancelling(tensor: Tensor) -> float:
    """How far rows are from adding up to zero, from 0 to 1, as they do where they are gradients by softmax logits.

    Examples
    --------
    >>> import torch
    >>> cancelling(torch.tensor([[1.0, -2.0], [-1.0, 2.0]])), cancelling(torch.ones(2, 2))
    (0.0, 1.0)
    """
    numbers = tensor.double()
    total = float(numbers.abs().sum())
    return float(numbers.sum(0).abs().sum()) / total if total > 0 else 0.0


def labelled(second: Tensor, crossed: Tensor) -> dict[str, float]:
    """How far moments are from those of features h that end in a 1, with one-hot labels y.

    Then the rows of ``C = mean y h^T`` add up to the last row of ``S = mean h h^T``; the last entry of S is at most 1;
    the last column of C holds the classes' frequencies f; and, by Jensen, ``sum_c C_cj^2 / f_c <= S_jj``.

    Parameters
    ----------
    second, crossed
        S [d, d] and C [classes, d].

    Examples
    --------
    >>> import torch
    >>> h, y = torch.tensor([[2.0, 1.0], [4.0, 1.0]]), torch.eye(2)
    >>> labelled(h.T @ h / 2, y.T @ h / 2)
    {'one-hot labels': 0.0, 'moments of labelled features': 0.0}
    """
    s, c = second.double(), crossed.double()
    last, total = s[-1], c.sum(0)
    size = max(float(last.abs().sum()), float(total.abs().sum()))
    one_hot = float((last - total).abs().sum()) / size if size > 0 else 0.0
    # Without that, the last feature is no 1 and nothing else is known.
    moments = 1.0
    if one_hot <= _BROKEN:
        frequency = c[:, -1]
        diagonal = s.diagonal()
        within = (c.square() / frequency.clamp_min(1e-12)[:, None])[frequency > 0].sum(0)
        unit = diagonal + 1e-3 * diagonal.mean()
        beyond = float(((within - diagonal) / unit.clamp_min(1e-300)).max())
        moments = max(0.0, float(last[-1]) - 1, -float(frequency.min()), beyond)
    return {"one-hot labels": one_hot, "moments of labelled features": moments}


def breaches(errors: Sequence[Mapping[str, float]]) -> dict[int, str]:
    """Clients that break an identity which more than half of them keep: by place, the identity's name.

    Parameters
    ----------
    errors
        Each client's error by name of the identity, 0 where it holds exactly.

    Examples
    --------
    >>> breaches([{"sum": 0.0}, {"sum": 0.001}, {"sum": 0.9}]), breaches([{"sum": 0.0}, {"sum": 0.9}])
    ({2: 'sum'}, {})
    """
    names = dict.fromkeys(name for each in errors for name in each)
    kept = [name for name in names if 2 * sum(each.get(name, 1.0) <= _KEPT for each in errors) > len(errors)]
    return {
        place: name
        for place, each in enumerate(errors)
        for name in reversed(kept)
        if not each.get(name, 1.0) <= _BROKEN  # NaN is broken too
    }
