"""FedLPA: one-shot merging by layer-wise posteriors of the clients."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.curvature.collected import Collected, report_averaged
from fedmerge.curvature.kronecker import LayerSystem
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import FisherKfac, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["FedLPA"]

log = logging.getLogger("fedmerge")


@register("fedlpa", paper="arXiv:2310.00339")
@dataclass(frozen=True)
class FedLPA(Aggregator):
    """Mode of the product of the clients' layer-wise Gaussian posteriors, with empirical Kronecker factors.

    Liu et al. 2024, eq. 10: ``sum_k p_k (B_k + l_B) M (A_k + l_A) = sum_k p_k (B_k + l_B) M_k (A_k + l_A)`` for each
    matrix layer, A_k of its inputs and B_k of the gradients by its outputs at the true labels. The authors
    add one absolute ridge to both and take 10,000 gradient steps; here the system is solved. Ridges are in
    units of the clients' mean: common to all, so that a client whose gradients have vanished, because it fits
    its data, still counts by its inputs. Everything else is averaged; equal factors give FedAvg.

    Parameters
    ----------
    damping_inputs
        l_A, in units of the mean diagonal of the A_k, at least 0.
    damping_outputs
        l_B, in units of the mean diagonal of the B_k, at least 0. Large values count inputs alone.
    tolerance, max_steps
        Of conjugate gradients, per layer.
    """

    damping_inputs: float = 0.3
    damping_outputs: float = 1.0
    tolerance: float = 1e-7
    max_steps: int = 1000

    def __post_init__(self) -> None:
        check_range(self, "damping_inputs", 0.0, float("inf"), open_high=True)
        check_range(self, "damping_outputs", 0.0, float("inf"), open_high=True)
        check_range(self, "tolerance", 0.0, 1.0, open_high=True)
        check_range(self, "max_steps", 1, float("inf"), open_high=True)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Kronecker factors at the true labels."""
        return (FisherKfac(estimator="empirical"),)

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Solve every layer; the memory stays empty."""
        clients = Collected.of(updates)
        merged, measured = dict(clients.mean), clients.measured("fisher_kfac")
        layers = [name[: -len(".A")] for name in measured if name.endswith(".A")]
        report_averaged("fedlpa", merged, layers)
        for weight in layers:
            if f"{weight}.G" not in measured:
                continue
            inputs = _damped(measured[f"{weight}.A"], clients.weights, self.damping_inputs)
            outputs = _damped(measured[f"{weight}.G"], clients.weights, self.damping_outputs)
            system = LayerSystem.of(clients, weight, inputs, outputs, clients.weights, 0.0)
            solution, _, definite = system.solved(tolerance=self.tolerance, max_steps=self.max_steps)
            if definite:
                merged.update(solution)
            else:
                log.warning("fedlpa: the factors of %r are not positive semidefinite: averaged instead", weight)
        return merged, {}


def _damped(factors: list[Tensor], weights: tuple[float, ...], damping: float) -> list[Tensor]:
    """Factors plus a ridge in units of their weighted mean diagonal."""
    unit = sum(p * float(f.diagonal(dim1=-2, dim2=-1).double().mean()) for p, f in zip(weights, factors, strict=True))
    identity = torch.eye(factors[0].shape[-1], dtype=torch.float64, device=factors[0].device)
    return [factor.double() + damping * unit * identity for factor in factors]
