"""Krum and Multi-Krum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.pieces import counted, squared_distances
from fedmerge.errors import InvalidOption, NoUsableUpdates
from fedmerge.lookup.option_checks import check_form, check_range
from fedmerge.registry import register
from fedmerge.state import State, WeightedSum
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Krum"]


@register("krum", paper="arXiv:1703.02757")
@dataclass(frozen=True)
class Krum(Aggregator):
    """The client nearest to its neighbours (Krum), or the mean of several such (Multi-Krum).

    Blanchard et al. 2017: with n clients of which f are hostile, a client's score is the sum of squared distances
    to the n - f - 2 nearest others; the `selected` lowest scores are averaged, each with one vote. It wants
    n >= 2 f + 3. A client whose update could not be used counts as one of the f where too few others are left. On
    skewed labels an honest client may be far from all others, and is left out then.

    Parameters
    ----------
    attackers
        f: below 1 the largest share of the clients that may be hostile, from 1 on their number.
    selected
        How many are averaged, at least 1, which is Krum; never more than the n - f that can be honest.
    form
        ``"paper"`` as above. ``"flower"`` as Flower's Krum and MultiKrum: any number of clients will do, a score counts
        the max(1, n - f - 2) nearest, any `selected` are averaged, weighted by their examples, and of equal scores
        NumPy's sort takes one.

    Examples
    --------
    >>> import torch
    >>> sent = [ClientUpdate(i, {"w": torch.tensor([v])}) for i, v in enumerate((1.0, 1.1, 1.3, 1.4, 1e6))]
    >>> Krum(attackers=1).merge(sent, MergeContext(), {})[0]["w"]
    tensor([1.1000])
    """

    attackers: float = 0.2
    selected: int = 1
    form: Literal["paper", "flower"] = "paper"

    def __post_init__(self) -> None:
        check_range(self, "attackers", 0.0, math.inf, open_high=True)
        check_range(self, "selected", 1, math.inf, open_high=True)
        check_form(self, self.form)
        if self.attackers >= 1 and self.attackers != int(self.attackers):
            raise InvalidOption(
                f"Krum: attackers must be a share below 1 or a whole number of clients, got {self.attackers!r}"
            )

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """The mean of those with the lowest scores, of equal ones the first."""
        updates = list(updates)
        count = len(updates)
        hostile = counted(self.attackers, count) if self.attackers < 1 else int(self.attackers)
        papers = self.form == "paper"
        if papers and count + context.left_out() < 2 * hostile + 3:
            raise NoUsableUpdates(
                f"Krum with {hostile} attackers wants at least {2 * hostile + 3} usable updates, got {count}: "
                "lower attackers, or have more clients take part"
            )
        # Who has been left out already is one of the attackers: no more are sought than so many clients can show.
        hostile = min(hostile, max(0, (count - 3) // 2)) if papers and context.left_out() else hostile
        distances = squared_distances(updates).sort(1).values[:, 1:]  # the nearest of all is a client itself
        scores = distances[:, : max(1, count - hostile - 2)].sum(1)
        most = min(self.selected, count - hostile) if papers else self.selected
        order = scores.sort(stable=True).indices if papers else _as_numpy_sorts(scores, updates)
        total = WeightedSum()
        for i in order[:most].sort().values.tolist():
            total.add(updates[i].state, 1.0 if papers else updates[i].weight)
        return total.mean(), {}


def _as_numpy_sorts(scores: Tensor, updates: Sequence[ClientUpdate]) -> Tensor:
    """Places in ascending order. Two clients that are each other's nearest have equal scores, and which of them Flower
    takes is up to NumPy's sort, which differs by type and by processor."""
    simple = [tensor for tensor in updates[0].state.values() if tensor.dtype in (torch.float16, torch.float32)]
    kind = max((tensor.dtype for tensor in simple), key=lambda dtype: dtype.itemsize, default=torch.float64)
    kind = kind if len(simple) == len(updates[0].state) else torch.float64
    return torch.from_numpy(np.argsort(scores.to(kind).numpy()))
