"""LSTM layers written out step by step, so that each weight becomes a linear layer that taps can serve."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["unroll"]

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
