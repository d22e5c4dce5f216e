"""The multi-layer perceptron: the smallest model with neurons to match."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.models.checks import Widths, flag, widths
from fedmerge.models.initial import he_normal
from fedmerge.registry import register

__all__ = ["MLP"]


@register("mlp", kind="model")
class MLP(nn.Module):
    """Linear layers with ReLU between them, on the flattened input.

    The default of one hidden layer of 100 units is the network of PFNM's experiments (Yurochkin et al.,
    "Bayesian Nonparametric Federated Learning of Neural Networks", arXiv:1905.12022).

    Parameters
    ----------
    input_shape
        Shape of one example, of any rank.
    num_classes
        Number of logits.
    hidden
        Width of each hidden layer, first to last; an empty list leaves logistic regression.
    bias
        Whether the layers have biases.

    Raises
    ------
    InvalidOption
        A width is no positive whole number, or `bias` is no bool.

    Examples
    --------
    >>> import torch
    >>> model = MLP((1, 8, 8), 10, hidden=(32, 16))
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    >>> [tuple(layer.weight.shape) for layer in model.layers]
    [(32, 64), (16, 32), (10, 16)]
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        hidden: Widths = (100,),
        bias: bool = True,
    ) -> None:
        super().__init__()
        bias = flag("mlp", "bias", bias)
        sizes = (prod(input_shape), *widths("mlp", "hidden", hidden), num_classes)
        self.layers = nn.ModuleList(nn.Linear(below, above, bias=bias) for below, above in pairwise(sizes))
        he_normal(self.layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of inputs [B, *input_shape]."""
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        logits: Tensor = self.layers[-1](x)
        return logits
