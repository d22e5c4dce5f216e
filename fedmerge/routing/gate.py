"""Gates: small networks that say how much each expert counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Gate"]


@dataclass(frozen=True)
class Gate:
    """Linear layers with ReLU between them, from what a gate looks at to a weight for each expert.

    Parameters
    ----------
    layers
        Weight [out, in] and bias [out] of each, float32; with none, the weights are what it looks at.
    looks_at
        Name of the module whose input it sees, averaged over tokens or pixels; ``""`` for the model's own inputs, None
        for a preference, which is the same for all inputs.
    softmax
        Whether weights are positive and add up to 1.
    normalise
        Whether what it sees is brought to mean 0 and variance 1 first, each example by itself.

    Examples
    --------
    >>> gate = Gate(((torch.tensor([[2.0], [0.0]]), torch.zeros(2)),), looks_at="", softmax=True)
    >>> gate.weights(torch.tensor([[0.0], [100.0]]))
    tensor([[0.5000, 0.5000],
            [1.0000, 0.0000]])
    """

    layers: tuple[tuple[Tensor, Tensor], ...] = ()
    looks_at: str | None = None
    softmax: bool = False
    normalise: bool = False

    @classmethod
    def fresh(
        cls,
        width: int,
        start: Tensor,
        looks_at: str | None,
        *,
        hidden: int = 0,
        softmax: bool = False,
        normalise: bool = False,
        generator: torch.Generator,
    ) -> Gate:
        """A gate that gives all inputs the weights `start` [experts], before it has learnt anything.

        Its last layer begins at zero, so that no expert is favoured by where it stands.

        Parameters
        ----------
        width
            How many numbers it sees of an example.
        hidden
            Width of a layer in between; 0 for none.
        """
        bias, layers, last = (start.log() if softmax else start).float(), [], width
        if hidden:
            first = torch.randn(hidden, width, generator=generator) / width**0.5
            layers, last = [(first, torch.zeros(hidden))], hidden
        layers.append((torch.zeros(len(start), last), bias.clone()))
        return cls(tuple(layers), looks_at, softmax, normalise)

    def weights(self, seen: Tensor) -> Tensor:
        """Weights [examples, experts] by what is seen of each example [examples, width]."""
        values = seen.float()
        if self.normalise:
            values = F.layer_norm(values, values.shape[-1:])
        for number, (weight, bias) in enumerate(self.layers):
            values = F.linear(values.relu() if number else values, weight.float(), bias.float())
        return values.softmax(-1) if self.softmax else values
