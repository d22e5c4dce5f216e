"""VGG-9: a deep network without normalisation, on which layer-wise matching was first shown."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.models.checks import Widths, flag, fraction, image, widths
from fedmerge.models.initial import he_normal
from fedmerge.registry import register

__all__ = ["VGG9"]


@register("vgg9", kind="model")
class VGG9(nn.Module):
    """Six 3x3 convolutions, 2x2 max pooling after every second, then three linear layers; ReLU between all.

    The VGG-9 of FedMA's CIFAR-10 experiments (Wang et al., "Federated Learning with Matched Averaging",
    arXiv:2002.06440, appendix), after Simonyan and Zisserman (arXiv:1409.1556). Hidden layers start from
    He's normal weights: with torch's defaults nine layers without normalisation hardly start to learn.

    Parameters
    ----------
    input_shape
        (channels, height, width) of one image.
    num_classes
        Number of logits.
    channels
        Maps of the six convolutions.
    hidden
        Widths of the linear layers before the last.
    dropout
        Share of inputs dropped before each linear layer, in training only.
    bias
        Whether the layers have biases.

    Raises
    ------
    ModelError
        The input is no image, or one with a side under 8 pixels.
    InvalidOption
        An option has a value of the wrong type or range.

    Examples
    --------
    >>> import torch
    >>> model = VGG9((1, 28, 28), 10, channels=(4, 4, 8, 8, 8, 8), hidden=(16, 16))
    >>> model(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        channels: Widths = (32, 64, 128, 128, 256, 256),
        hidden: Widths = (512, 512),
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        depth, height, width = image("vgg9", input_shape, 8, "it halves them three times")
        maps = widths("vgg9", "channels", channels, count=6)
        bias = flag("vgg9", "bias", bias)
        self.dropout = fraction("vgg9", "dropout", dropout)
        self.conv = nn.ModuleList(
            nn.Conv2d(below, above, 3, padding=1, bias=bias) for below, above in pairwise((depth, *maps))
        )
        pixels = (height // 8) * (width // 8)
        sizes = (maps[-1] * pixels, *widths("vgg9", "hidden", hidden), num_classes)
        self.linear = nn.ModuleList(nn.Linear(below, above, bias=bias) for below, above in pairwise(sizes))
        he_normal(self.conv, self.linear[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, channels, height, width]."""
        for index, layer in enumerate(self.conv):
            x = F.relu(layer(x))
            if index % 2 == 1:
                x = F.max_pool2d(x, 2)
        x = x.flatten(1)
        for layer in self.linear[:-1]:
            x = F.relu(layer(F.dropout(x, self.dropout, self.training)))
        logits: Tensor = self.linear[-1](F.dropout(x, self.dropout, self.training))
        return logits
