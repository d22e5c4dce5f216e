"""CCA merging: features carried onto the reference's by the linear map that correlates them most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmerge.aggregators.aligning import Aligning
from fedmerge.checks.validation import not_finite
from fedmerge.errors import BadUpdate
from fedmerge.lookup.option_checks import check_range
from fedmerge.matching.activation_costs import Heard, not_heard_singly, permutations_by
from fedmerge.matching.fairness import anchor_of, bounded
from fedmerge.matching.symmetries import sampled_inputs, symmetries
from fedmerge.permutations import Plan, transport
from fedmerge.registry import register
from fedmerge.state import is_sane
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["CCAMerge"]

_TIE = 1e-3  # correlations below this are none


@register("cca", paper="arXiv:2407.05385")
@dataclass(frozen=True)
class CCAMerge(Aligning):
    """Features carried onto those of the most typical client by canonical correlation analysis; then the average.

    Horoi et al. 2024. With the covariances Sxx of the reference, Syy of a client and Sxy between them,
    ``Sxx^-1/2 Sxy Syy^-1/2 = U S V^T``; a client's features become ``y T``, ``T = Syy^-1/2 V U^T Sxx^1/2``, and what
    takes them in ``T^-1`` of itself. That is no permutation: nonlinearities do not follow it, and statistics of
    batch norm have to be measured again. Heads of attention and groups of a norm, which a mixture of features would
    break, are re-ordered as a whole and within.

    Parameters
    ----------
    gamma
        Ridge on the covariances, relative to their mean diagonal, positive.
    examples
        At most so many of the server's are listened to, evenly from all its batches; at least 1.
    """

    requires_data = True

    gamma: float = 0.1
    examples: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "examples", 1, float("inf"), open_high=True)
        check_range(self, "gamma", 1e-12, float("inf"), open_high=True)

    def align(self, updates: Sequence[ClientUpdate], context: MergeContext) -> Iterator[ClientUpdate | BadUpdate]:
        """Carry each client onto the one that looks like most."""
        if len(updates) == 1:
            yield from updates
            return
        spec = symmetries(context, updates[0].state, "CCA merging")
        modules = [context.module(u.state, "CCA merging") for u in updates]
        trained = bounded([context.trained(u.state, "CCA merging") for u in updates])
        anchor = anchor_of(trained, [u.weight for u in updates])
        others = [i for i in range(len(updates)) if i != anchor]
        pairs = [(anchor, anchor), *((i, i) for i in others), *((anchor, i) for i in others)]
        heard = Heard.of(spec, modules, pairs, sampled_inputs(context, "CCA merging", self.examples))
        heard.check([u.client for u in updates])
        for j, update in enumerate(updates):
            if j == anchor:
                yield update
                continue
            plans = {}
            perms = permutations_by(spec, heard, (anchor, j), trained)
            for unit, number in heard:
                if unit.simple and (number, anchor, anchor) in heard.found:
                    three = (anchor, anchor), (j, j), (anchor, j)
                    reference, own, cross = (heard.found[number, *pair] for pair in three)
                    perm = perms[unit.index]
                    if any(bool(part.silent(0).all()) for part in (reference, own)):  # nothing to be rotated
                        matrix = torch.eye(len(perm)).to(own.products)[perm.to(own.products.device)]
                        plans[unit.index] = Plan(matrix, matrix)
                    else:
                        plans[unit.index] = self._plan(
                            reference.covariance(), own.covariance(), cross.covariance(), perm
                        )
            state = spec.apply(update.state, not_heard_singly(spec, perms, heard))
            carried = transport(spec, state, plans)
            # Variances of mixtures: weights squared, or some would be negative.
            squared = {i: Plan(plan.produce.square(), plan.consume) for i, plan in plans.items()}
            variances = {n: t for n, t in state.items() if n.rpartition(".")[2] == "running_var"}
            carried |= transport(spec, variances, squared)
            huge = next((name for name, tensor in carried.items() if not is_sane(tensor)), None)
            yield replace(update, state=carried) if huge is None else not_finite(update.client, huge, carried[huge])

    def _plan(self, reference: Tensor, own: Tensor, cross: Tensor, perm: Tensor) -> Plan:
        """``T`` by Cholesky factors S = L L^T: as L^-1 is a rotation of S^-1/2, which cancels, T is the same.

        Directions in which nothing varies together have no rotation of their own, not even a sign, which would turn
        a neuron that is silent on these data into a loud one: there the permutation decides.
        """
        # In units of their own, so that nothing overflows where one says far more than the other.
        unit_x, unit_y = (s.diagonal().clamp_min(0).mean().clamp_min(1e-300).sqrt() for s in (reference, own))
        lx, ly = self._root(reference / unit_x.square()), self._root(own / unit_y.square())
        whitened = torch.linalg.solve_triangular(lx, cross / (unit_x * unit_y), upper=False)
        whitened = torch.linalg.solve_triangular(ly, whitened.T, upper=False).T
        u, correlations, vt = torch.linalg.svd(whitened)
        some, none = correlations > _TIE, correlations <= _TIE
        rotation = u[:, some] @ vt[some]  # from the client's whitened features to the reference's
        if bool(none.any()):
            moved = torch.linalg.solve_triangular(lx, ly[perm.to(ly.device)], upper=False)
            left, _, right = torch.linalg.svd(u[:, none].T @ moved @ vt[none].T)
            rotation = rotation + u[:, none] @ left @ right @ vt[none]
        forward = torch.linalg.solve_triangular(ly.T, rotation.T @ lx.T, upper=True)
        backward = torch.linalg.solve_triangular(lx.T, rotation @ ly.T, upper=True)
        return Plan(forward.T * (unit_x / unit_y), backward * (unit_y / unit_x))

    def _root(self, covariance: Tensor) -> Tensor:
        """The Cholesky factor of a covariance with mean diagonal 1, with as much ridge as rounding makes needful."""
        ridge, eye = self.gamma, torch.eye(len(covariance)).to(covariance)
        root, failed = torch.linalg.cholesky_ex(covariance + ridge * eye)
        while bool(failed) and ridge < len(covariance):  # what is rounded is never as indefinite as its trace
            ridge *= 10
            root, failed = torch.linalg.cholesky_ex(covariance + ridge * eye)
        factor: Tensor = root
        return factor
