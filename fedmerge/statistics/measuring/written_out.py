"""Recurrent layers and norms written out as layers of their own, so that taps serve their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AffineLayer", "add_scales", "affine_layers", "split_norms", "unroll"]

_States = tuple[Tensor, Tensor]


def unroll(model: nn.Module) -> None:
    """Replace every LSTM and LSTM cell of `model` by the same computation in linear layers.

    Parameters are shared with what was there. Projections (``proj_size``) and packed sequences stay as they
    are: their weights have no matrix layers then.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.LSTM and child.proj_size == 0:
                setattr(module, name, _LSTM(child))
            elif type(child) is nn.LSTMCell:
                setattr(module, name, _Cell(child, ""))


class _Cell(nn.Module):
    """One step: gates i, f, g, o = W_ih x + b_ih + W_hh h + b_hh."""

    def __init__(self, cell: nn.Module, suffix: str) -> None:
        super().__init__()
        self.ih = _linear(cell, "ih", suffix)
        self.hh = _linear(cell, "hh", suffix)

    def forward(self, x: Tensor, states: _States | None = None) -> _States:
        hidden = self.hh.weight.shape[1]
        h, c = states if states is not None else (x.new_zeros(*x.shape[:-1], hidden),) * 2
        i, f, g, o = (self.ih(x) + self.hh(h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class _LSTM(nn.Module):
    """Layers and directions of cells; takes what ``nn.LSTM`` takes, but for packed sequences."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.batch_first = lstm.batch_first
        directions = ("", "_reverse") if lstm.bidirectional else ("",)
        self.cells = [
            [_Cell(lstm, f"_l{layer}{direction}") for direction in directions] for layer in range(lstm.num_layers)
        ]
        self.registered = nn.ModuleList(cell for cells in self.cells for cell in cells)

    def forward(self, x: Tensor, states: _States | None = None) -> tuple[Tensor, _States]:
        steps = x.transpose(0, 1) if self.batch_first else x
        ends: list[_States] = []
        for cells in self.cells:
            outputs = []
            for backward, cell in enumerate(cells):
                state = None if states is None else (states[0][len(ends)], states[1][len(ends)])
                order = range(len(steps) - 1, -1, -1) if backward else range(len(steps))
                reached: dict[int, _States] = {}
                for t in order:
                    reached[t] = state = cell(steps[t], state)
                ends.append(reached[order[-1]])
                outputs.append(torch.stack([reached[t][0] for t in range(len(steps))]))
            steps = torch.cat(outputs, -1)
        last = torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends])
        return steps.transpose(0, 1) if self.batch_first else steps, last


def _linear(owner: nn.Module, gate: str, suffix: str) -> nn.Linear:
    """A linear layer on the parameters ``weight_<gate><suffix>`` and ``bias_<gate><suffix>`` of `owner`."""
    weight: nn.Parameter = getattr(owner, f"weight_{gate}{suffix}")
    bias: nn.Parameter | None = getattr(owner, f"bias_{gate}{suffix}", None)
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


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
        by_parameter = [
            torch.stack([self._summed(g * x) for x, g in zip(inputs, gradients, strict=True)]).sum(0),
            torch.stack([self._summed(g) for g in gradients]).sum(0),
        ]
        return dict(zip(self.names, by_parameter, strict=False))

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
    layers = []
    for module in model.modules():
        if isinstance(module, _Affine):
            own = [p for p in (module.weight, module.bias) if p is not None]
            chosen = tuple(names[id(p)] for p in own)
            if all(map(selects, chosen)) and all(owners.count(id(p)) == 1 for p in own):
                layers.append(AffineLayer(module, chosen))
    return layers


def add_scales(
    total: dict[str, Tensor],
    layers: Sequence[AffineLayer],
    inputs: Sequence[Sequence[Tensor]],
    gradients: Sequence[Sequence[Tensor]],
) -> None:
    """Add ``sum_b g_b^2`` of scales and shifts to `total`, for one vector's gradients at the outputs of every call."""
    for layer, seen, given_back in zip(layers, inputs, gradients, strict=True):
        for name, each in layer.example_gradients(seen, given_back).items():
            total[name] += each.square().sum(0).double()
