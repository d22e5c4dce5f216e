"""Small models, and what a hostile client makes of their tensors."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

WIDTH = 6
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(7))
Y = torch.arange(24) % 3


def seeded(make, seed: int) -> nn.Module:
    """A model whose weights follow from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def network(seed: int = 0, width: int = WIDTH) -> nn.Module:
    """Two hidden layers, a batch norm behind the first."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(4, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 3),
        ),
        seed,
    )


def normed(seed: int = 0, width: int = WIDTH) -> nn.Module:
    """Two hidden layers and no buffers."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)),
        seed,
    )


def two_groups(seed: int = 0, width: int = WIDTH) -> nn.Module:
    """A hidden layer of two groups, which are blocks."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(4, width), nn.GroupNorm(2, width), nn.ReLU(), nn.Linear(width, 3)), seed
    )


class TiedLayers(nn.Module):
    """Two hidden layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.second, self.third = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        for layer in (self.first, self.second, self.third):
            x = torch.relu(layer(x))
        return self.last(x)


def tied_layers(seed: int = 0) -> nn.Module:
    """A model of them."""
    return seeded(TiedLayers, seed)


def changed(change):
    """A change of every parameter, running statistics left as they are."""

    def make(state):
        return {
            n: change(t).to(t.dtype) if t.is_floating_point() and "running" not in n else t for n, t in state.items()
        }

    return make


def signs(tensor: Tensor) -> Tensor:
    """Ones of both signs, in no order."""
    drawn = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))
    return torch.where(drawn > 0.5, 1.0, -1.0)


def first(tensor: Tensor) -> Tensor:
    """1 at the first entry, else 0."""
    return (torch.arange(tensor.numel()) == 0).reshape(tensor.shape).to(tensor.dtype)


def noise(state):
    """Random numbers, as large as the model's."""
    generator = torch.Generator().manual_seed(5)
    return changed(lambda t: torch.randn(t.shape, generator=generator) * t.square().mean().sqrt())(state)


def equal_neurons(state):
    """Every neuron of a layer what its first one is."""
    return changed(lambda t: t[:1].expand_as(t).clone())(state)


def one_direction(state):
    """Matrices of rank 1."""
    return changed(lambda t: torch.outer(t[:, 0], t[0]) if t.ndim == 2 else t)(state)


def flipped(state):
    """Incoming and outgoing weights of hidden neurons negated."""
    return {n: -t if n.startswith(("0", "3")) else t for n, t in state.items()}


def of_two_axes(model: nn.Module, factor: float) -> nn.Module:
    """The model with its first layer so much louder."""
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud[0].weight.mul_(factor)
        loud[0].bias.mul_(factor)
    return loud


def shuffled(state, seed: int):
    """The model of :func:`normed` with its hidden neurons in another order."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randperm(len(state[n]), generator=generator) for n in ("0.weight", "2.weight"))
    return {"0.weight": state["0.weight"][a], "0.bias": state["0.bias"][a],
            "2.weight": state["2.weight"][b][:, a], "2.bias": state["2.bias"][b],
            "4.weight": state["4.weight"][:, b], "4.bias": state["4.bias"]}  # fmt: skip
