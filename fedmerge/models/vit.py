"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.errors import InvalidOption, ModelError
from fedmerge.models.checks import image, whole
from fedmerge.registry import register

__all__ = ["ViT"]


@register("vit", kind="model")
class ViT(nn.Module):
    """Patches, learned positions, pre-norm transformer blocks, the mean over patches, one linear layer.

    Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929, with the mean over patches in
    place of the class token (as in Beyer et al., "Better plain ViT baselines", arXiv:2205.01580).
    Attention is written with plain linear layers, so that a trace shows every head.

    Parameters
    ----------
    input_shape
        (channels, height, width) of one image.
    num_classes
        Number of logits.
    dim
        Size of a patch's vector.
    depth
        Number of blocks.
    heads
        Attention heads of a block, a divisor of `dim`.
    patch
        Side of a patch in pixels, a divisor of the image's height and width.
    mlp_ratio
        Hidden units of a block's two-layer perceptron, in multiples of `dim`.

    Raises
    ------
    ModelError
        The input is no image, one smaller than a patch, or one that `patch` does not divide.
    InvalidOption
        An option is no positive whole number, or `heads` does not divide `dim`.

    Examples
    --------
    >>> model = ViT((1, 28, 28), 10, dim=16, depth=1, heads=2)
    >>> model(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        patch: int = 4,
        mlp_ratio: int = 2,
    ) -> None:
        super().__init__()
        patch, dim = whole("vit", "patch", patch), whole("vit", "dim", dim)
        depth, heads = whole("vit", "depth", depth), whole("vit", "heads", heads)
        channels, height, width = image("vit", input_shape, patch, f"a patch has {patch}x{patch} pixels")
        if height % patch or width % patch:
            raise ModelError(
                f"model 'vit' cuts images into patches of {patch}x{patch} pixels, "
                f"which do not tile {height}x{width}. Set option 'patch' to a divisor of both sides."
            )
        if dim % heads:
            raise InvalidOption(f"option 'heads' of model 'vit' must divide 'dim': {heads} does not divide {dim}.")
        hidden = dim * whole("vit", "mlp_ratio", mlp_ratio)
        patches = (height // patch) * (width // patch)
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        # Ten times the usual 0.02: under plain SGD, the mean over patches is blind to places for long otherwise.
        self.positions = nn.Parameter(torch.randn(1, patches, dim) * 0.2)
        self.blocks = nn.ModuleList(_Block(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, channels, height, width]."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.output(self.norm(x).mean(dim=1))
        return logits


class _Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised at its entry and added to what came in."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = _Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        update: Tensor = self.linear2(F.gelu(self.linear1(self.norm2(x))))
        return x + update


class _Attention(nn.Module):
    """Multi-head self-attention over the patches, [B, N, dim] to [B, N, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        # A key bias adds one number to all scores of a query: softmax forgets it, no gradient reaches it.
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, dim / heads]
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out
