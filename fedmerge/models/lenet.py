"""LeNet-5, the small convolutional network of handwritten digits."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.models.checks import Widths, flag, image, whole, widths
from fedmerge.models.initial import he_normal
from fedmerge.registry import register

__all__ = ["LeNet"]


@register("lenet", kind="model")
class LeNet(nn.Module):
    """Twice convolution, ReLU and 2x2 max pooling, then linear layers with ReLU between them.

    LeNet-5 (LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998) in the form used
    today: ReLU for tanh, max for average pooling, every map connected to every map below.

    The convolutions are not padded, as in the paper. Where the shorter side of the images is under four
    kernels (20 pixels for a kernel of 5), too little would be left, so both convolutions pad by
    ``kernel // 2`` zeros and keep the size (odd kernels): 8x8 digits become 4x4, then 2x2 maps.

    Parameters
    ----------
    input_shape
        (channels, height, width) of one image.
    num_classes
        Number of logits.
    channels
        Maps of the two convolutions.
    hidden
        Width of each linear layer before the last.
    kernel
        Side of both convolution kernels in pixels.
    bias
        Whether the layers have biases.

    Raises
    ------
    ModelError
        The input is no image, or one with a side under 4 pixels.
    InvalidOption
        An option has a value of the wrong type or range.

    Examples
    --------
    >>> import torch
    >>> model = LeNet((1, 28, 28), 10)
    >>> model(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    >>> sum(p.numel() for p in model.parameters())
    44426
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        channels: Widths = (6, 16),
        hidden: Widths = (120, 84),
        kernel: int = 5,
        bias: bool = True,
    ) -> None:
        super().__init__()
        depth, height, width = image("lenet", input_shape, 4, "it halves them twice")
        first, second = widths("lenet", "channels", channels, count=2)
        kernel, bias = whole("lenet", "kernel", kernel), flag("lenet", "bias", bias)
        padding = kernel // 2 if min(height, width) < 4 * kernel else 0
        self.conv1 = nn.Conv2d(depth, first, kernel, padding=padding, bias=bias)
        self.conv2 = nn.Conv2d(first, second, kernel, padding=padding, bias=bias)

        for _ in range(2):
            height = (height + 2 * padding - kernel + 1) // 2
            width = (width + 2 * padding - kernel + 1) // 2
        sizes = (second * height * width, *widths("lenet", "hidden", hidden), num_classes)
        self.linear = nn.ModuleList(nn.Linear(below, above, bias=bias) for below, above in pairwise(sizes))
        he_normal(self.conv1, self.conv2, self.linear[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, channels, height, width]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.flatten(1)
        for layer in self.linear[:-1]:
            x = F.relu(layer(x))
        logits: Tensor = self.linear[-1](x)
        return logits
