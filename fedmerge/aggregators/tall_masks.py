"""TALL masks: which entries of the merged update each client keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.task_vectors import TaskVectors
from fedmerge.edits.delta import parts
from fedmerge.lookup.option_checks import check_range
from fedmerge.personal import PersonalPart, pack_bits, remembered_parts
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["TallMasks", "tall_mask"]


@register("tall_masks", paper="arXiv:2405.07813")
@dataclass(frozen=True)
class TallMasks(Aggregator):
    """FedAvg, and for each client a mask of the entries of its update in which the others do not drown it.

    Wang et al. 2024, equations 3 and 5: with ``tau = sum_i tau_i``, client i keeps
    ``mask_i = [|tau_i| > threshold * |tau - tau_i|]``, and its own model is ``theta_0 + mask_i * tau``. Here tau_i
    counts by its examples: with p_i the client's share, ``tau = sum_i p_i tau_i``, the mask compares ``p_i tau_i`` with
    the rest, and the client's model is ``theta_0 + mask_i * tau / p_i``; equal shares give the paper's. Clients that
    moved different parameters get back exactly what they sent.

    The shared model is ``theta_0 + tau``, which is FedAvg. Each client costs one bit a parameter and one number; they
    are at ``MergeResult.personal``.

    Parameters
    ----------
    threshold
        lambda, at least 0; the authors choose from 0.2 to 0.6 for each client. The sum over the others grows with
        their number, and so may have to what a client is held against: the more clients agree, the less.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.personal import parts_in
    >>> base = {"w": torch.zeros(2)}
    >>> sent = [ClientUpdate(i, {"w": 4 * torch.eye(2)[i]}) for i in range(2)]
    >>> shared, memory = TallMasks().merge(sent, MergeContext(base=base), {})
    >>> shared["w"], parts_in(memory)[1].of(shared, base)["w"]
    (tensor([2., 2.]), tensor([0., 4.]))
    """

    separable = "tensor"
    requires_base: ClassVar[bool] = True

    threshold: float = 0.4

    def __post_init__(self) -> None:
        check_range(self, "threshold", 0.0, math.inf, open_high=True)

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """The mean, and as memory the clients' masks; those of earlier rounds, of other models, are dropped."""
        vectors = TaskVectors.of(updates, context, "tall_masks")
        means = {name: vectors.by_parts(name, partial(vectors.mean, name)) for name in vectors.names}
        parts = []
        for i, (update, share) in enumerate(zip(vectors.updates, vectors.shares, strict=True)):
            masks = {name: self._mask(vectors, i, name, mean) for name, mean in means.items()}
            parts.append(PersonalPart(update.client, masks, 1 / share))
        return {name: vectors.base[name] + mean for name, mean in means.items()}, remembered_parts(parts)

    def _mask(self, vectors: TaskVectors, client: int, name: str, mean: Tensor) -> Tensor:
        share, flat = vectors.shares[client], mean.reshape(-1)
        bits = [
            pack_bits(tall_mask(share * vectors.of_client(client, name, part), flat[part], self.threshold))
            for part in parts(len(flat))
        ]
        return torch.cat(bits) if bits else pack_bits(flat)


def tall_mask(own: Tensor, total: Tensor, threshold: float) -> Tensor:
    """Where one term of a sum is larger than `threshold` times all others together."""
    return own.abs() > threshold * (total - own).abs()
