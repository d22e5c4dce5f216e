"""Which parts of a model are in training mode while a client trains."""

from __future__ import annotations

from torch import nn

from fedmerge.layout import FrozenMode, frozen_parts

__all__ = ["training_mode"]


def training_mode(model: nn.Module, frozen_mode: FrozenMode = "eval") -> None:
    """Put a model into training mode, but for parts that are frozen as a whole, which run as in use.

    Their dropout is off and their batch norms keep to their running statistics, so that what is trained behind them
    sees what it will see in use. With ``frozen_mode="train"`` they go with the rest.

    Examples
    --------
    >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.Dropout(), nn.Linear(3, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> training_mode(model)
    >>> [part.training for part in model]
    [False, True, True]
    """
    model.train()
    for part in frozen_parts(model) if frozen_mode == "eval" else ():
        part.eval()
