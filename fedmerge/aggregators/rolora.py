"""RoLoRA: rounds that train B alternate with rounds that train A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedmerge.aggregators.held_mean import HeldMean
from fedmerge.registry import register

__all__ = ["RoLora"]


@register("rolora", paper="arXiv:2409.02346")
@dataclass(frozen=True)
class RoLora(HeldMean):
    """Average of the factor that clients trained: B in odd rounds, A in even ones, the other being common.

    Chen et al. 2024, algorithm 1. Each average is exactly that of the updates, for half the bytes, and in the long run
    both factors learn. Of embeddings A comes first, for it starts at zero.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.update import ClientUpdate, MergeContext
    >>> base = {"lora_A.weight": torch.ones(1, 2), "lora_B.weight": torch.ones(1, 1)}
    >>> sent = [ClientUpdate(i, {**base, "lora_A.weight": torch.full((1, 2), 2.0 * i)}) for i in range(2)]
    >>> RoLora().merge(sent, MergeContext(base=base, round=2), {})[0]["lora_A.weight"]
    tensor([[1., 1.]])
    """

    holds: ClassVar[Literal["A", "B", "turns"]] = "turns"
