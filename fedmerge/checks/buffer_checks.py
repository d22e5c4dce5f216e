"""Checks on the buffers that a client sends: what no training makes of the model's own."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fedmerge.errors import BadUpdate
from fedmerge.state import LARGEST, as_rows, is_norm_statistic

__all__ = ["check_buffer", "fine_rows"]

MOST_GROWTH = 10_000_000
"""How far whole numbers in a buffer may leave the range of the model sent: more steps than any client takes a round."""


def check_buffer(client: int, name: str, tensor: Tensor, masks: Collection[str], start: Tensor | None) -> None:
    """Check one tensor, in the model's type, that may be a buffer, against that of the model sent, where there is one.

    Raises
    ------
    BadUpdate
        A negative variance or count, whole numbers far from the model's, NaN, or what is infinite or huge in a mask
        and is not so in the model's.
    """
    number = tensor.is_floating_point() or tensor.is_complex()
    if (number and name not in masks and not is_norm_statistic(name)) or bool(
        fine_rows(name, tensor[None], masks, start).all()
    ):
        return
    if number:
        what = "a negative variance" if is_norm_statistic(name) else f"entries beyond {LARGEST:g}"
        raise BadUpdate(client, f"buffer {name!r} has {what}, unlike the model sent", "Do not change what masks.")
    raise BadUpdate(
        client,
        f"buffer {name!r} counts to {_farthest(tensor)}, which no training does from {_told(start)}",
        "Start from the model that the server sent.",
    )


def fine_rows(name: str, stacked: Tensor, masks: Collection[str], start: Tensor | None) -> Tensor:
    """For tensors of K clients [K, ...] that may be buffers, which of them may be merged [K].

    How large parameters and running statistics are is not looked at here.

    Examples
    --------
    >>> fine_rows("norm.running_var", torch.tensor([[0.5], [-1.0]]), (), None).tolist()
    [True, False]
    """
    rows = as_rows(stacked)
    fine = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if not rows.shape[1] or rows.dtype == torch.bool:
        return fine
    if rows.is_floating_point() or rows.is_complex():
        if name.endswith("running_var") and not rows.is_complex():
            return rows.amin(1) >= 0
        known = name in masks and start is not None and start.shape == stacked.shape[1:]
        return _as_masked(rows, as_rows(start[None]).to(rows.device)) if known else fine  # type: ignore[index]
    low, high = rows.amin(1), rows.amax(1)
    if name.endswith("num_batches_tracked"):
        fine = low >= 0
    if start is None or not start.numel():
        return fine
    least, most = min(int(start.min()), 0) - MOST_GROWTH, max(int(start.max()), 0) + MOST_GROWTH
    limits = torch.iinfo(rows.dtype)
    return fine & (low >= max(least, limits.min)) & (high <= min(most, limits.max))


def _as_masked(rows: Tensor, own: Tensor) -> Tensor:
    """Whether all that is huge or infinite in a mask is so in the model's, NaN aside."""
    return ((rows == own) | rows.isnan() | (rows.abs() <= LARGEST)).all(1)


def _farthest(tensor: Tensor) -> int:
    low, high = int(tensor.min()), int(tensor.max())
    return low if -low > high else high


def _told(start: Tensor | None) -> str:
    return "the model sent" if start is None or not start.numel() else f"{_farthest(start)} in the model sent"
