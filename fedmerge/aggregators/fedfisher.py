"""FedFisher: one-shot merging by minimising the sum of the clients' Fisher quadratics."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator, ServerData
from fedmerge.curvature.collected import Collected, DiagonalSum
from fedmerge.curvature.kronecker import LayerSystem
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import FisherDiag, FisherKfac, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["FedFisher"]

log = logging.getLogger("fedmerge")


@register("fedfisher", paper="arXiv:2403.12329")
@dataclass(frozen=True)
class FedFisher(Aggregator):
    """Minimum of the clients' Fisher quadratics, from one exchange, with Kronecker-factored or diagonal Fishers.

    Jhunjhunwala et al. 2024, eq. 5: ``min_theta sum_i p_i (theta - theta_i)^T F_i (theta - theta_i)``. The
    authors take 2,000 steps from the average and stop early by accuracy on server data; here the quadratic,
    with a ridge towards the average, is solved to its optimum, layer by layer: in closed form for the
    diagonal, by preconditioned conjugate gradients from the average for K-FAC, where the ridge does what
    early stopping did, without data. Equal Fishers give FedAvg, and so do parameters that nothing measures.

    Parameters
    ----------
    variant
        ``"kfac"``: ``F_i = A_i (x) G_i`` for linear layers and convolutions, diagonal for the rest.
        ``"diag"``: diagonal throughout; undamped it is Fisher merging.
    damping
        The ridge, in units of the mean of the summed Fisher's diagonal in each layer, at least 0. Where not
        given, 0.1 for K-FAC, whose factors say more than the data support, and 0.001 for the diagonal.
    normalize
        Divide each client's Fisher by its trace to this power, in [0, 1]. 0 is the paper; there a client
        that has fitted its data has almost no Fisher, and no say. 0.5 tempers that.
    tolerance
        Conjugate gradients end when the gradient's norm is this part of that at the average.
    max_steps
        Most steps of conjugate gradients per layer.
    early_stopping
        Take the iterate of 0, 1, 2, 4, ... steps that has the best accuracy on the server's data, as the authors do, or
        the lowest loss in tasks without an accuracy; needs ``data`` with labels. K-FAC only.
    """

    variant: Literal["kfac", "diag"] = "kfac"
    damping: float | None = None
    normalize: float = 0.5
    tolerance: float = 1e-7
    max_steps: int = 1000
    early_stopping: bool = False

    def __post_init__(self) -> None:
        if self.variant not in ("kfac", "diag"):
            raise InvalidOption(f'FedFisher: variant must be "kfac" or "diag", got {self.variant!r}')
        if self.damping is not None:
            check_range(self, "damping", 0.0, float("inf"), open_high=True)
        check_range(self, "normalize", 0.0, 1.0)
        check_range(self, "tolerance", 0.0, 1.0, open_high=True)
        check_range(self, "max_steps", 1, float("inf"), open_high=True)
        if self.early_stopping and self.variant == "diag":
            raise InvalidOption("FedFisher: the diagonal is solved in closed form, there is nothing to stop early")

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The Fisher of the variant."""
        return (FisherDiag(),) if self.variant == "diag" else (FisherKfac(),)

    @property
    def server_data(self) -> ServerData:
        """Labels, where iterates are judged."""
        return "labels" if self.early_stopping else "none"

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Minimise; the memory stays empty."""
        if self.variant == "diag":
            return self._diagonal(updates), {}
        clients = Collected.of(updates)
        if not self.early_stopping:
            return self._kfac(clients, self.max_steps), {}
        best, best_score, steps = clients.mean, context.score(clients.mean, "fedfisher"), 1
        while True:
            solved = self._kfac(clients, steps)
            score = context.score(solved, "fedfisher")
            if score > best_score:
                best, best_score = solved, score
            if steps >= self.max_steps:
                return best, {}
            steps = min(4 * steps, self.max_steps)

    def _diagonal(self, updates: Iterable[ClientUpdate]) -> dict[str, Tensor]:
        total = DiagonalSum()
        for update in updates:
            information = update.statistic("fisher_diag")
            trace = sum(float(f.double().sum()) for f in information.values())
            total.add(update.state, information, update.weight, self._scale(trace))
        return total.minimum(self._ridge)

    @property
    def _ridge(self) -> float:
        if self.damping is not None:
            return self.damping
        return 0.1 if self.variant == "kfac" else 1e-3

    def _scale(self, trace: float) -> float:
        return float(trace**-self.normalize) if trace > 0 else 1.0

    def _kfac(self, clients: Collected, max_steps: int) -> dict[str, Tensor]:
        measured = clients.measured("fisher_kfac")
        layers = [name[: -len(".A")] for name in measured if name.endswith(".A")]
        diagonals = [name[: -len(".diag")] for name in measured if name.endswith(".diag")]
        weights = [p * self._scale(_trace(measured, layers, diagonals, i)) for i, p in enumerate(clients.weights)]
        merged = {**clients.mean, **self._remaining(clients, measured, diagonals, weights)}
        for layer in layers:
            if f"{layer}.G" in measured:
                merged.update(self._layer(clients, measured, layer, weights, max_steps))
        return merged

    def _layer(
        self, clients: Collected, measured: dict[str, list[Tensor]], layer: str, weights: list[float], max_steps: int
    ) -> dict[str, Tensor]:
        inputs, outputs = measured[f"{layer}.A"], measured[f"{layer}.G"]
        system = LayerSystem.of(clients, layer, inputs, outputs, weights, self._ridge)
        solution, residual, definite = system.solved(tolerance=self.tolerance, max_steps=max_steps)
        if not definite:
            log.warning("fedfisher: the factors of %r are not positive semidefinite: averaged instead", layer)
            return {name: clients.mean[name] for name in solution}
        if residual > 1e-2 and max_steps == self.max_steps:
            log.warning(
                "fedfisher: layer %r is not solved after %d steps (residual %.1e): raise damping or max_steps",
                layer, max_steps, residual,
            )  # fmt: skip
        return solution

    def _remaining(
        self, clients: Collected, measured: dict[str, list[Tensor]], names: list[str], weights: list[float]
    ) -> dict[str, Tensor]:
        """Parameters that have a diagonal only."""
        total = DiagonalSum()
        for i, state in enumerate(clients.states):
            information = {name: measured[f"{name}.diag"][i] for name in names}
            total.add({name: state[name] for name in names}, information, clients.weights[i],
                      weights[i] / clients.weights[i])  # fmt: skip
        return total.minimum(self._ridge)


def _trace(measured: dict[str, list[Tensor]], layers: list[str], diagonals: list[str], client: int) -> float:
    """Trace of one client's whole Fisher: ``tr (A (x) G) = tr A tr G``."""
    total = sum(float(measured[f"{name}.diag"][client].double().sum()) for name in diagonals)
    for layer in layers:
        if f"{layer}.G" in measured:
            inputs, outputs = (measured[f"{layer}.{side}"][client].double() for side in "AG")
            total += float(
                (inputs.diagonal(dim1=-2, dim2=-1).sum(-1) * outputs.diagonal(dim1=-2, dim2=-1).sum(-1)).sum()
            )
    return total
