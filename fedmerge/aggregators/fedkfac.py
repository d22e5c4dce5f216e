"""fedkfac: a curvature merge, a head fitted to all clients, and second-order steps, all from sums that clients send."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmerge.aggregators.aligning import Permuting
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.matching.weight_costs import match_many
from fedmerge.permutations import PermutationSpec
from fedmerge.registry import register
from fedmerge.statistics import FisherKfac, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["FedKfac"]

_TOGETHER = 0.25
"""Mean cosine between clients' weights: near 1 from one start, near 0 for models trained apart."""
_ALL = 10**9
_HEAD_EXAMPLES = 5
_HEADS = {"none": (), "ridge": ("ridge_head",), "logistic": ("logistic_head",)}


@register("fedkfac")
@dataclass(frozen=True)
class FedKfac(Permuting):
    """Align if trained apart, merge by curvature, refit the head, take natural-gradient steps; clients send sums.

    fedmerge's own method. Neurons of models that were trained apart are matched on weights; layers become the minimum
    of the clients' Kronecker-factored quadratics, strongly damped; the head is fitted to the features of all clients
    (:class:`~fedmerge.refine.RidgeHead`), those of the merge, of the plain mean and of the largest client's own model,
    and the best goes on; then come natural-gradient steps (:class:`~fedmerge.refine.NaturalGradient`). Examples that
    clients hold out decide about everything, and no stage has to be taken. It needs clients that can be asked: a
    federation, or ``clients=``.

    Parameters
    ----------
    head
        ``"ridge"``, ``"none"``, or ``"logistic"``: some five more small exchanges for 0.1 points on average.
    steps
        Natural-gradient steps, at least 0.
    budget
        Most bytes that a client may send in all exchanges of a round, its model included, in units of the model's in
        float32, above 1; no limit where not given. Large matrices then travel as their leading eigenvectors in 8 bits,
        gradients in 8 bits, and steps that do not fit any more are not taken.
    examples
        At most so many of each client for Kronecker factors, and five times as many for the head; all where not given.
    combine
        What merges the aligned models.
    sweeps
        At most so many rounds of matching over all clients.

    Examples
    --------
    >>> import fedmerge
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> batch = torch.randn(20, 4), torch.randint(2, (20,))
    >>> merged = fedmerge.merge([net, net], "fedkfac", base=net, clients=[[batch], [batch]])
    """

    falls_back: ClassVar[bool] = True

    head: Literal["none", "ridge", "logistic"] = "ridge"
    steps: int = 3
    budget: float | None = None
    examples: int | None = 2000
    sweeps: int = 10
    combine: str = field(default="fedfisher(damping=0.5)", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "steps", 0, float("inf"), open_high=True)
        check_range(self, "sweeps", 1, float("inf"), open_high=True)
        if self.budget is not None and not self.budget > 1:
            raise InvalidOption(f"FedKfac: budget must be above 1, which is the model itself, got {self.budget!r}")
        if self.head not in _HEADS:
            raise InvalidOption(f"FedKfac: head must be of {sorted(_HEADS)}, got {self.head!r}")

    @property
    def upload(self) -> float | None:
        """The budget."""
        return self.budget

    @property
    def refined_by(self) -> str:
        """Norms and head, then natural-gradient steps, whose factors travel once."""
        if self.head == "none" and not self.steps:
            return ""
        limit = self.examples or _ALL
        parts = ["recalibrate", *(f"{head}(examples={_HEAD_EXAMPLES * limit})" for head in _HEADS[self.head])]
        if self.steps:
            parts.append(f"natural_gradient(count={self.steps},examples={limit},refresh=false)")
        return "+".join(parts)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """What the combination needs, of so many examples."""
        return tuple(
            replace(kind, examples=self.examples) if isinstance(kind, FisherKfac) else kind for kind in super().needs
        )

    def align(self, updates: Sequence[ClientUpdate], context: MergeContext) -> Iterator[ClientUpdate]:
        """Re-order neurons where the models do not stem from one start."""
        if _together([context.trained(update.state, "FedKfac") for update in updates]):
            yield from updates
        else:
            yield from super().align(updates, context)

    def permutations(
        self, spec: PermutationSpec, updates: Sequence[ClientUpdate], context: MergeContext
    ) -> list[list[Tensor]]:
        """Each to the mean of the others, on weights."""
        trained, weights = [context.trained(u.state, "FedKfac") for u in updates], [u.weight for u in updates]
        return match_many(spec, trained, weights, rounds=self.sweeps, generator=context.torch_generator("fedkfac"))


def _together(states: Sequence[dict[str, Tensor]]) -> bool:
    """Whether weights point the same way: the squared norm of the unit vectors' mean is 1/K for K strangers."""
    names = [name for name, tensor in states[0].items() if tensor.ndim > 1]
    flat = [torch.cat([state[name].flatten().double() for name in names]) for state in states]
    units = [vector / vector.norm().clamp_min(1e-300) for vector in flat]
    count = len(units)
    if count < 2:
        return True
    total = torch.stack(units).sum(0)
    return float((total.square().sum() - count) / (count * (count - 1))) >= _TOGETHER
