"""Layers with a low-rank adapter beside them, under the names that peft gives to their tensors."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.errors import AdapterError

__all__ = ["ADAPTER", "LoraConv2d", "LoraEmbedding", "LoraLayer", "LoraLinear", "wrapped"]

ADAPTER = "default"
"""Name of the one adapter that a layer has."""


class LoraLayer(nn.Module):
    """A frozen layer and ``scaling * B A`` beside it (Hu et al. 2021, arXiv:2106.09685, equation 3).

    Parameters
    ----------
    base_layer
        The layer; its parameters are marked as not trained.
    rank
        r.
    scaling
        By which the product is multiplied.
    """

    def __init__(self, base_layer: nn.Module, rank: int, scaling: float) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.r = {ADAPTER: rank}
        self.scaling = {ADAPTER: scaling}


class LoraLinear(LoraLayer):
    """A linear layer with an adapter; A starts as linear layers do, B at zero.

    Examples
    --------
    >>> layer, x = LoraLinear(nn.Linear(3, 2), 1, 2.0), torch.ones(1, 3)
    >>> torch.equal(layer(x), layer.base_layer(x)), list(dict(layer.named_parameters()))[2:]
    (True, ['lora_A.default.weight', 'lora_B.default.weight'])
    """

    def __init__(self, base_layer: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__(base_layer, rank, scaling)
        like: dict[str, Any] = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.lora_A = nn.ModuleDict({ADAPTER: nn.Linear(base_layer.in_features, rank, bias=False, **like)})
        self.lora_B = nn.ModuleDict({ADAPTER: nn.Linear(rank, base_layer.out_features, bias=False, **like)})
        _start(cast(Tensor, self.lora_A[ADAPTER].weight), cast(Tensor, self.lora_B[ADAPTER].weight))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        update: Tensor = self.lora_B[ADAPTER](self.lora_A[ADAPTER](x))
        result: Tensor = self.base_layer(x)
        return result + update * self.scaling[ADAPTER]


class LoraConv2d(LoraLayer):
    """A convolution with an adapter: a convolution of the same kernel to r channels, and one of kernel 1 behind it.

    Examples
    --------
    >>> layer = LoraConv2d(nn.Conv2d(3, 8, 5, padding=2), 2, 1.0)
    >>> layer.lora_A["default"].weight.shape, layer(torch.ones(1, 3, 6, 6)).shape
    (torch.Size([2, 3, 5, 5]), torch.Size([1, 8, 6, 6]))
    """

    def __init__(self, base_layer: nn.Conv2d, rank: int, scaling: float) -> None:
        super().__init__(base_layer, rank, scaling)
        base: Any = base_layer
        like: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        # A pair of these shapes is of a dense kernel: groups of channels would each need one of their own.
        if base.groups != 1:
            raise AdapterError(f"a convolution with {base.groups} groups cannot have a low-rank adapter: leave it out")
        first = nn.Conv2d(
            base.in_channels, rank, base.kernel_size, base.stride, base.padding, base.dilation,
            bias=False, padding_mode=base.padding_mode, **like,
        )  # fmt: skip
        self.lora_A = nn.ModuleDict({ADAPTER: first})
        self.lora_B = nn.ModuleDict({ADAPTER: nn.Conv2d(rank, base.out_channels, 1, bias=False, **like)})
        _start(first.weight, cast(Tensor, self.lora_B[ADAPTER].weight))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, height, width] to [B, out, height', width']."""
        update: Tensor = self.lora_B[ADAPTER](self.lora_A[ADAPTER](x))
        result: Tensor = self.base_layer(x)
        return result + update * self.scaling[ADAPTER]


class LoraEmbedding(LoraLayer):
    """An embedding with an adapter: a row of ``A^T`` for each word, carried on by B; here A starts at zero.

    Examples
    --------
    >>> layer = LoraEmbedding(nn.Embedding(10, 4), 2, 1.0)
    >>> layer.lora_embedding_A["default"].shape, layer(torch.tensor([1, 2])).shape
    (torch.Size([2, 10]), torch.Size([2, 4]))
    """

    def __init__(self, base_layer: nn.Embedding, rank: int, scaling: float) -> None:
        super().__init__(base_layer, rank, scaling)
        if base_layer.max_norm is not None:
            raise AdapterError("an embedding with max_norm changes itself as it is used: leave it out of the targets")
        weight = base_layer.weight
        a = torch.zeros(rank, base_layer.num_embeddings, device=weight.device, dtype=weight.dtype)
        b = torch.randn(base_layer.embedding_dim, rank, device=weight.device, dtype=weight.dtype)
        self.lora_embedding_A = nn.ParameterDict({ADAPTER: nn.Parameter(a)})
        self.lora_embedding_B = nn.ParameterDict({ADAPTER: nn.Parameter(b)})

    def forward(self, x: Tensor) -> Tensor:
        """Integers [...] to [..., width]."""
        rows = F.embedding(
            x, self.lora_embedding_A[ADAPTER].T, padding_idx=cast(int | None, self.base_layer.padding_idx)
        )
        result: Tensor = self.base_layer(x)
        update: Tensor = rows @ self.lora_embedding_B[ADAPTER].T
        return result + update * self.scaling[ADAPTER]


def wrapped(layer: nn.Module, rank: int, scaling: float) -> LoraLayer | None:
    """The layer with an adapter; None where it is of a kind that can have none here.

    Raises
    ------
    AdapterError
        It is of such a kind, and has settings that an adapter cannot follow.
    """
    if type(layer) is nn.Linear:
        return LoraLinear(layer, rank, scaling)
    if type(layer) is nn.Conv2d:
        return LoraConv2d(layer, rank, scaling)
    if type(layer) is nn.Embedding:
        return LoraEmbedding(layer, rank, scaling)
    return None


@torch.no_grad()
def _start(a: Tensor, b: Tensor) -> None:
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(b)
