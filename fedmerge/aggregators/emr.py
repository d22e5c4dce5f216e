"""EMR: elect, mask and rescale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.task_vectors import TaskVectors
from fedmerge.edits.delta import parts
from fedmerge.personal import PersonalPart, pack_bits, remembered_parts
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Emr"]


@register("emr", paper="arXiv:2405.17461")
@dataclass(frozen=True)
class Emr(Aggregator):
    """One update that all share, and for each client a mask of the entries whose sign is its own, and a number.

    Huang et al. 2024, algorithm 1. Elect: ``g = sign(sum_i p_i tau_i)``, where a sum of zero counts as -1, and
    ``tau`` is g times the largest |tau_i| among clients whose sign is g. Mask: ``m_i = [tau_i g > 0]``. Rescale:
    ``r_i = sum_t mean|tau_i| / sum_t mean|m_i tau|``, each mean over one tensor, so that a bias counts as much as a
    matrix. Client i's own model is ``theta_0 + r_i * m_i * tau``. The authors elect with equal weights; p_i is the
    client's share of the examples. Clients that sent the same get it back exactly, and so does one alone.

    The shared model is ``theta_0 + tau``: the part that clients have in common, which is longer than any of their
    updates and made to be masked. It is a poor start for another round: merge by this method once, at the end of a
    federation. Each client costs one bit a parameter and one number; they are at
    ``MergeResult.personal``.

    Examples
    --------
    >>> from fedmerge.personal import parts_in
    >>> base = {"w": torch.zeros(2)}
    >>> sent = [ClientUpdate(0, {"w": torch.tensor([3.0, 1.0])}), ClientUpdate(1, {"w": torch.tensor([1.0, -2.0])})]
    >>> shared, memory = Emr().merge(sent, MergeContext(base=base), {})
    >>> shared["w"], parts_in(memory)[0].of(shared, base)["w"]
    (tensor([ 3., -2.]), tensor([4., 0.]))
    """

    separable = "tensor"
    requires_base: ClassVar[bool] = True

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """The shared model, and as memory the clients' parts; those of earlier rounds, of other models, are dropped."""
        vectors = TaskVectors.of(updates, context, "emr")
        unified = {name: vectors.by_parts(name, partial(_unified, vectors, name)) for name in vectors.names}
        parts = [self._part(vectors, i, unified) for i in range(len(vectors))]
        return {name: vectors.base[name] + shared for name, shared in unified.items()}, remembered_parts(parts)

    def _part(self, vectors: TaskVectors, client: int, unified: State) -> PersonalPart:
        packed, sent, left = {}, 0.0, 0.0
        for name, shared in unified.items():
            bits, flat = [], shared.reshape(-1)
            for part in parts(len(flat)):
                own, elected = vectors.of_client(client, name, part), flat[part]
                mask = (own != 0) & (own.sign() == elected.sign())
                bits.append(pack_bits(mask))
                sent += float(own.abs().sum(dtype=torch.float64)) / len(flat)
                left += float(elected.abs().mul_(mask).sum(dtype=torch.float64)) / len(flat)
            packed[name] = torch.cat(bits) if bits else pack_bits(flat)
        return PersonalPart(vectors.updates[client].client, packed, sent / left if left else 1.0)


def _unified(vectors: TaskVectors, name: str, part: slice) -> Tensor:
    """The elected sign times the largest magnitude that has it; zero where no client moved."""
    sign = torch.where(vectors.mean(name, part) > 0, 1.0, -1.0)
    largest = torch.zeros_like(vectors.of_client(0, name, part))
    for vector in vectors.each(name, part):
        largest = torch.maximum(largest, sign * vector)
    return sign * largest
