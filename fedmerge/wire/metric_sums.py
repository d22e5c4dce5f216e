"""Sums of a task's metrics among the numbers of a reply: they add up over clients, as figures do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from flwr.app import MetricRecord
from torch import Tensor

__all__ = ["add_up", "without_sums", "written_sums"]

_PREFIX = "sums."


def written_sums(sums: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Entries of a MetricRecord, whose names tell the shapes.

    Examples
    --------
    >>> written_sums({"mae": torch.tensor([3.0, 2.0])})
    {'sums.mae.2': [3.0, 2.0]}
    """
    return {
        f"{_PREFIX}{name}.{'x'.join(map(str, tensor.shape))}": tensor.double().flatten().tolist()
        for name, tensor in sums.items()
    }


def add_up(records: Iterable[Mapping[str, object]]) -> dict[str, Tensor]:
    """The sums of all these clients by metric; what one client alone has in another shape is left out.

    Examples
    --------
    >>> add_up([{"sums.mae.2": [3.0, 2.0], "eval_loss": 0.5}, {"sums.mae.2": [1.0, 2.0]}])["mae"].tolist()
    [4.0, 4.0]
    """
    total: dict[str, Tensor] = {}
    for record in records:
        for key, values in record.items():
            name, _, shape = key.removeprefix(_PREFIX).rpartition(".")
            sizes = [int(size) for size in shape.split("x") if size.isdecimal()]
            if not key.startswith(_PREFIX) or not isinstance(values, list) or not name:
                continue
            tensor = torch.tensor(values, dtype=torch.float64)
            if tensor.numel() != torch.Size(sizes).numel():
                continue
            tensor = tensor.reshape(sizes)
            if name not in total:
                total[name] = tensor
            elif total[name].shape == tensor.shape:
                total[name] = total[name] + tensor
    return total


def without_sums(record: MetricRecord) -> MetricRecord:
    """The other numbers."""
    return MetricRecord({key: value for key, value in record.items() if not key.startswith(_PREFIX)})
