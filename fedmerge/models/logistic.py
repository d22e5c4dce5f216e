"""Multinomial logistic regression: the convex model on which most federated theory is stated."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn

from fedmerge.models.checks import flag
from fedmerge.registry import register

__all__ = ["Logistic"]


@register("logistic", kind="model")
class Logistic(nn.Module):
    """One linear layer on the flattened input; the softmax belongs to the loss.

    Parameters
    ----------
    input_shape
        Shape of one example, of any rank.
    num_classes
        Number of logits.
    bias
        Whether the layer has a bias.

    Raises
    ------
    InvalidOption
        `bias` is no bool.

    Examples
    --------
    >>> import torch
    >>> model = Logistic((1, 8, 8), 10)
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, *, bias: bool = True) -> None:
        super().__init__()
        self.output = nn.Linear(prod(input_shape), num_classes, bias=flag("logistic", "bias", bias))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of inputs [B, *input_shape]."""
        logits: Tensor = self.output(x.flatten(1))
        return logits
