"""MaTS: matching models in their task subspace, by conjugate gradients from the average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.curvature.collected import Collected, report_averaged
from fedmerge.curvature.kronecker import LayerSystem
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import FisherKfac, Gram, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["MaTS"]


@register("mats", paper="arXiv:2312.04339")
@dataclass(frozen=True)
class MaTS(Aggregator):
    """Models matched where their inputs and gradients live, by some conjugate-gradient steps from the average.

    Tam et al. 2024, eq. 4: ``sum_i p_i C_i theta = sum_i p_i C_i theta_i`` for each matrix layer, with
    ``C_i = A_i (x) G_i`` (inputs and output gradients) or ``C_i = A_i (x) I`` (inputs alone). The system has
    many solutions where no client has inputs, so start and number of steps belong to the method: the start
    is FedAvg, and steps are plain, for a preconditioner would go first where least is known. Everything
    else is averaged. Equal C_i give FedAvg; with inputs alone and enough steps it is RegMean without shrinkage.

    Parameters
    ----------
    curvature
        ``"kfac"`` or ``"gram"``. The diagonal, which the paper has too, is solved in closed form by ``fisher``.
    steps
        Conjugate-gradient steps per layer, at least 0. Where not given, 100 for K-FAC, as the authors take, and
        10 for Grams, which determine so little that more steps fit what is not there.
    """

    separable = "layer"
    curvature: Literal["kfac", "gram"] = "kfac"
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.curvature not in ("kfac", "gram"):
            raise InvalidOption(f'MaTS: curvature must be "kfac" or "gram", got {self.curvature!r}')
        if self.steps is not None:
            check_range(self, "steps", 0, float("inf"), open_high=True)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Kronecker factors, or Gram matrices."""
        return (FisherKfac(),) if self.curvature == "kfac" else (Gram(),)

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Step in every layer; the memory stays empty."""
        clients = Collected.of(updates)
        merged = dict(clients.mean)
        steps = self.steps if self.steps is not None else 100 if self.curvature == "kfac" else 10
        if self.curvature == "gram":
            measured = clients.measured("gram")
            report_averaged("mats", merged, measured)
            for weight, grams in measured.items():
                groups = len(grams[0]) if grams[0].ndim == 3 else 1
                identity = torch.eye(clients.mean[weight].shape[0] // groups, device=grams[0].device).expand(
                    groups, -1, -1
                )
                system = LayerSystem.of(clients, weight, grams, [identity] * len(grams), clients.weights, 0.0)
                merged.update(system.stepped(steps))
            return merged, {}
        measured = clients.measured("fisher_kfac")
        layers = [name[: -len(".A")] for name in measured if name.endswith(".A")]
        report_averaged("mats", merged, layers)
        for weight in layers:
            if f"{weight}.G" in measured:
                inputs, outputs = measured[f"{weight}.A"], measured[f"{weight}.G"]
                system = LayerSystem.of(clients, weight, inputs, outputs, clients.weights, 0.0)
                merged.update(system.stepped(steps))
        return merged, {}
