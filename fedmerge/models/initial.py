"""Initial weights for ReLU networks, where torch's defaults let the signal fade from layer to layer."""

from __future__ import annotations

from torch import nn

__all__ = ["he_normal"]


def he_normal(*modules: nn.Module) -> None:
    """Draw the convolutions and linear layers inside `modules` from He's normal distribution, biases zero.

    A weight has variance 2 / fan_in, so that a ReLU layer keeps the second moment of what passes through
    (He et al., "Delving Deep into Rectifiers", arXiv:1502.01852, equation 10). Torch's default has a sixth
    of it.

    Examples
    --------
    >>> import torch
    >>> layer = nn.Linear(200, 300)
    >>> he_normal(layer)
    >>> bool((layer.weight.var() * 200 - 2).abs() < 0.1), bool((layer.bias == 0).all())
    (True, True)
    """
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
