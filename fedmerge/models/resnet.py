"""The residual networks of CIFAR, with batch or group normalisation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.errors import InvalidOption
from fedmerge.models.checks import choice, image, whole
from fedmerge.models.initial import he_normal
from fedmerge.registry import register

__all__ = ["ResNet", "resnet8", "resnet20"]


class ResNet(nn.Module):
    """A 3x3 convolution, three stages of `blocks` residual blocks, the mean over space, one linear layer.

    The 6n+2 layers of He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section
    4.2, with n = `blocks`. The second and third stage halve the image and double the channels. Their first
    block has a projection shortcut (option B of the paper), where the paper's CIFAR networks pad with
    zeros: a projection gives each stage channels of its own, where zeros would tie them to the stage below.

    Batch normalisation keeps statistics of each client's own data, which disagree where the clients do.
    Group normalisation keeps none, and held up where batch normalisation lost accuracy (Hsieh et al., "The
    Non-IID Data Quagmire of Decentralized Machine Learning", arXiv:1910.00189).

    Parameters
    ----------
    input_shape
        (channels, height, width) of one image.
    num_classes
        Number of logits.
    blocks
        Residual blocks in each of the three stages.
    width
        Channels of the first stage.
    norm
        ``"batch"`` or ``"group"``.
    groups
        Groups of group normalisation, a divisor of `width`; unused with batch normalisation. The default of
        2 is that of Reddi et al., arXiv:2003.00295. Only channels of one group may swap places freely.
    name
        What error messages call the model.

    Raises
    ------
    ModelError
        The input is no image, or one with a side under 5 pixels.
    InvalidOption
        An option has a value of the wrong type or range, or `groups` does not divide `width`.

    Examples
    --------
    >>> import torch
    >>> model = ResNet((3, 32, 32), 10, blocks=1, width=4, norm="group")
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> list(model.buffers())
    []
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        blocks: int,
        width: int = 16,
        norm: str = "batch",
        groups: int = 2,
        name: str = "resnet",
    ) -> None:
        super().__init__()
        # From 5 pixels on, the last stage has 2x2: on one pixel, a batch of one has no variance to divide by.
        depth, _, _ = image(name, input_shape, 5, "it halves them twice and needs 2x2 to normalise over")
        blocks, width = whole(name, "blocks", blocks), whole(name, "width", width)
        groups = whole(name, "groups", groups)
        if choice(name, "norm", norm, ("batch", "group")) == "batch":
            groups = 0
        elif width % groups:
            raise InvalidOption(
                f"option 'groups' of model {name!r} must divide 'width': {groups} does not divide {width}."
            )
        self.conv = nn.Conv2d(depth, width, 3, padding=1, bias=False)
        self.norm = _norm(width, groups)
        self.blocks = nn.ModuleList()
        below = width
        for stage in range(3):
            above = width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(_Block(below, above, stride, groups))
                below = above
        he_normal(self)
        self.output = nn.Linear(below, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, channels, height, width]."""
        x = F.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.output(x.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut; the shortcut is a projection where the shape changes."""

    def __init__(self, below: int, above: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(below, above, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _norm(above, groups)
        self.conv2 = nn.Conv2d(above, above, 3, padding=1, bias=False)
        self.norm2 = _norm(above, groups)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or below != above:
            projection = nn.Conv2d(below, above, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, _norm(above, groups))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def _norm(channels: int, groups: int) -> nn.Module:
    """Group normalisation, or batch normalisation where `groups` is 0."""
    return nn.GroupNorm(groups, channels) if groups else nn.BatchNorm2d(channels)


@register("resnet8", kind="model")
def resnet8(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    width: int = 16,
    norm: str = "batch",
    groups: int = 2,
) -> ResNet:
    """ResNet-8: one residual block a stage. Options and errors as in `ResNet`.

    Examples
    --------
    >>> len(resnet8((3, 32, 32), 10).blocks)
    3
    """
    return ResNet(input_shape, num_classes, blocks=1, width=width, norm=norm, groups=groups, name="resnet8")


@register("resnet20", kind="model")
def resnet20(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    width: int = 16,
    norm: str = "batch",
    groups: int = 2,
) -> ResNet:
    """ResNet-20: three residual blocks a stage. Options and errors as in `ResNet`.

    Examples
    --------
    >>> sum(p.numel() for p in resnet20((3, 32, 32), 10).parameters())
    272474
    """
    return ResNet(input_shape, num_classes, blocks=3, width=width, norm=norm, groups=groups, name="resnet20")
