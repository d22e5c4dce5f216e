"""FFA-LoRA: A stays as it was drawn, B is averaged."""

from __future__ import annotations

from dataclasses import dataclass

from fedmerge.aggregators.held_mean import HeldMean
from fedmerge.registry import register

__all__ = ["FfaLora"]


@register("ffa_lora", paper="arXiv:2403.12313")
@dataclass(frozen=True)
class FfaLora(HeldMean):
    """Average of the factors B, the only ones that clients train and send; A stays as all have drawn it.

    Sun et al. 2024, section 4: with one A, ``sum_i p_i s B_i A = s (sum_i p_i B_i) A``, the average of the updates,
    for half the bytes. The A of all clients has to be the same from the start, hence of one seed. Of embeddings, whose
    A starts at zero, B is held.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.update import ClientUpdate, MergeContext
    >>> base = {"lora_A.weight": torch.ones(1, 2), "lora_B.weight": torch.zeros(1, 1)}
    >>> sent = [ClientUpdate(i, {**base, "lora_B.weight": torch.full((1, 1), 2.0 * i)}) for i in range(2)]
    >>> FfaLora().merge(sent, MergeContext(base=base), {})[0]["lora_B.weight"]
    tensor([[1.]])
    """
