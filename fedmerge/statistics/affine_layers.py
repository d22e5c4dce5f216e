"""Scales and shifts of normalisation layers as layers of their own, so that taps serve their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AffineLayer", "affine_layers", "split_norms"]

_CHANNELS_FIRST = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
_LAST = (nn.LayerNorm,)


class _Affine(nn.Module):
    """``x * weight + bias``, over channels or over the last dimensions."""

    def __init__(self, norm: nn.Module, channels_first: bool) -> None:
        super().__init__()
        own = norm._parameters
        self.register_parameter("weight", own["weight"])
        self.register_parameter("bias", own.get("bias"))
        self.channels_first = channels_first

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """Scaled and shifted."""
        shape = (-1, *[1] * (x.ndim - 2)) if self.channels_first else self.weight.shape
        scaled = x * self.weight.view(shape)
        return scaled if self.bias is None else scaled + self.bias.view(shape)


class _Split(nn.Module):
    """A norm without scales, then its scales; whatever else is asked of it, the norm answers (transformers ask)."""

    def __init__(self, norm: nn.Module, channels_first: bool) -> None:
        super().__init__()
        self.affine = _Affine(norm, channels_first)
        self.plain = copy.copy(norm)
        self.plain._parameters = dict.fromkeys(norm._parameters)

    def forward(self, x: Tensor) -> Tensor:
        """As before."""
        scaled: Tensor = self.affine(self.plain(x))
        return scaled

    def __getattr__(self, name: str) -> Any:
        if name in ("affine", "plain"):
            return super().__getattr__(name)
        return getattr(self.affine if name in ("weight", "bias") else self.plain, name)


def split_norms(model: nn.Module) -> None:
    """Replace every normalisation with scales by one without, followed by its scales; parameters are shared."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            first = type(child) in _CHANNELS_FIRST
            if (first or type(child) in _LAST) and isinstance(child._parameters.get("weight"), Tensor):
                setattr(module, name, _Split(child, first))


@dataclass(frozen=True)
class AffineLayer:
    """Scales and shifts: a module, and its parameters by the model's names."""

    module: _Affine
    names: tuple[str, ...]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The scales, and the shifts where there are any."""
        return tuple(p for p in (self.module.weight, self.module.bias) if p is not None)

    def example_gradients(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Every example's gradient of each parameter, [B, ...], from what every call saw and gave back."""
        found = [
            torch.stack([self._summed(g * x) for x, g in zip(inputs, gradients, strict=True)]).sum(0),
            torch.stack([self._summed(g) for g in gradients]).sum(0),
        ]
        return dict(zip(self.names, found, strict=False))

    def _summed(self, values: Tensor) -> Tensor:
        """Over positions, [B, ...] of the parameters' shape."""
        if self.module.channels_first:
            return values.flatten(2).sum(2) if values.ndim > 2 else values
        between = values.ndim - 1 - self.module.weight.ndim
        return values.flatten(1, between).sum(1) if between else values


def affine_layers(model: nn.Module, names: Mapping[int, str], selects: Callable[[str], bool]) -> list[AffineLayer]:
    """Those of a model that :func:`split_norms` has been through, whose parameters are all selected.

    `names` are its parameters' names by identity. A scale that several modules share is not among them.
    """
    owners = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    found = []
    for module in model.modules():
        if isinstance(module, _Affine):
            own = [p for p in (module.weight, module.bias) if p is not None]
            chosen = tuple(names[id(p)] for p in own)
            if all(map(selects, chosen)) and all(owners.count(id(p)) == 1 for p in own):
                found.append(AffineLayer(module, chosen))
    return found
