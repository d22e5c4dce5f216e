"""MA-Echo: the average moved until each client's own inputs see little change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.curvature.collected import Collected, report_averaged
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import ClassCounts, Gram, Statistic
from fedmerge.statistics.measuring.weight_matrices import WeightMatrix
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["MAEcho"]

_ROUNDING = 1e-4


@register("maecho", paper="arXiv:2204.12493")
@dataclass(frozen=True)
class MAEcho(Aggregator):
    """The average, moved within the space of each client's inputs towards that client.

    Su et al. 2022: each client's model may change freely in the null space of its inputs, so only
    ``(W - W_i) P_i`` is a loss, P_i the projector onto the space of client i's inputs to the layer. From the
    average, ``W <- W - step_size * sum_i p_i (W - W_i) P_i``. The authors build P_i by recursive least squares
    over batches, in an order that matters; here it is its closed form ``P_i = G_i (G_i + damping)^-1`` from the
    Gram matrix G_i. Where clients send class counts, the output layer's row of a class heeds each client by
    its examples of that class. Everything without a Gram is averaged; equal Grams give FedAvg.

    Parameters
    ----------
    steps
        At least 0; 0 is FedAvg, and few steps stay near it.
    step_size
        In (0, 2): above 2 the iteration diverges, for projectors have eigenvalues up to 1.
    damping
        Inputs weaker than this part of the mean diagonal of G_i count as null space, softly; positive. Small
        values make every direction with any input count alike, which the authors' recursion does not reach.
    class_aware
        Whether the output layer is merged class by class. Then FedAvg is no longer what equal Grams give there.
    """

    steps: int = 60
    step_size: float = 1.6
    damping: float = 1.0
    class_aware: bool = True

    def __post_init__(self) -> None:
        check_range(self, "steps", 0, float("inf"), open_high=True)
        check_range(self, "step_size", 1e-12, 2.0, open_high=True)
        check_range(self, "damping", 1e-12, float("inf"), open_high=True)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Gram matrices, and class counts for the output layer."""
        return (Gram(), ClassCounts()) if self.class_aware else (Gram(),)

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Iterate in every layer; the memory stays empty."""
        clients = Collected.of(updates)
        merged, grams = dict(clients.mean), clients.measured("gram")
        shares = torch.tensor(clients.weights, dtype=torch.float64)[:, None, None, None]
        report_averaged("maecho", merged, grams)
        output, by_class = self._output_layer(clients, list(grams))
        for weight, factors in grams.items():
            matrix = WeightMatrix.measured_by(weight, factors[0], clients.mean)
            own = torch.stack([matrix.gather(state).double() for state in clients.states])
            projectors = torch.stack([self._projector(factor, matrix) for factor in factors])
            weights = (by_class if weight == output else shares).to(own.device)
            start = (weights * own).sum(0)
            merged.update(matrix.scatter(self._moved(start, own, projectors, weights)))
        return merged, {}

    def _moved(self, start: Tensor, own: Tensor, projectors: Tensor, weights: Tensor) -> Tensor:
        """``W - step_size sum_i w_i (W - W_i) P_i``, repeated; the sums over clients are taken once."""
        target = (weights * (own @ projectors)).sum(0)
        if weights.shape[2] == 1:
            combined = (weights * projectors).sum(0)
            for _ in range(self.steps):
                start = start - self.step_size * (start @ combined - target)
        else:
            for _ in range(self.steps):
                start = start - self.step_size * ((weights * (start @ projectors)).sum(0) - target)
        return start

    def _projector(self, factor: Tensor, matrix: WeightMatrix) -> Tensor:
        """``G (G + damping)^-1``, whose eigenvalues lie in [0, 1] also where rounding made G indefinite."""
        gram = factor.double().reshape(matrix.groups, matrix.columns, matrix.columns)
        gram = (gram + gram.transpose(-1, -2)) / 2
        unit = gram.diagonal(dim1=-2, dim2=-1).mean()
        if unit <= 0:
            return torch.zeros_like(gram)
        damping = self.damping * unit
        identity = torch.eye(matrix.columns, dtype=torch.float64, device=gram.device)
        # What is this near to positive semidefinite grows by a hundredth of itself at most in sixty steps.
        _, failed = torch.linalg.cholesky_ex(gram + _ROUNDING * damping * identity)
        if not failed.any():
            projector: Tensor = torch.linalg.solve(gram + damping * identity, gram)
            return projector
        values, vectors = torch.linalg.eigh(gram)
        # Rounding spreads zeros about zero: what is not clearly above the most negative may be one of them.
        values = torch.where(values > -2 * values[..., :1], values, 0.0)
        clamped: Tensor = (vectors * (values / (values + damping)).unsqueeze(-2)) @ vectors.transpose(-1, -2)
        return clamped

    def _output_layer(self, clients: Collected, layers: list[str]) -> tuple[str | None, Tensor]:
        """The last layer with a row per class, and weights [clients, 1, classes, 1] of its rows."""
        if not self.class_aware or not layers:
            return None, torch.zeros(())
        counts = clients.measured("class_counts").get("class_counts")
        weight = layers[-1]
        if counts is None or len(counts[0]) != clients.mean[weight].shape[0]:
            return None, torch.zeros(())
        table = torch.stack(counts).double()
        prior = torch.tensor(clients.weights, dtype=torch.float64, device=table.device)[:, None]
        # A class that nobody has is averaged as everything else.
        share = torch.where(table.sum(0) > 0, table / table.sum(0).clamp_min(1e-300), prior)
        return weight, share[:, None, :, None]
