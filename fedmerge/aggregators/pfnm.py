"""PFNM: neurons matched to a global layer that grows where clients have learnt different things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedmerge.aggregators.layerwise import Layerwise
from fedmerge.matching.features import Unit, rows
from fedmerge.registry import register
from fedmerge.state import State

__all__ = ["PFNM"]


@register("pfnm", paper="arXiv:1905.12022")
@dataclass(frozen=True)
class PFNM(Layerwise):
    """Neurons matched to global ones by a Beta-Bernoulli process; a layer grows where nothing fits.

    Yurochkin et al. 2019. A neuron is what goes into it and, before the output layer, what comes out of it, whose
    class c has the precision ``n_jc / (sigma sum_k n_kc)``. Layers are matched from the input on, each in the
    coordinates of the layers before. A global neuron is the mean of the clients' that were matched to it, each
    weighed by its examples; the output layer weighs each class by who has seen it. Rounds after the first, in
    which all clients start from the merged model, keep its order of neurons. Heads of attention and groups of a norm
    are re-ordered as a whole and within, and a layer grows only where a grown model computes what it did.

    Parameters
    ----------
    sigma
        Variance of a client's neuron about the global one, positive.
    sigma0
        Variance of global neurons about 0, positive.
    gamma
        Readiness to add neurons, positive: small values keep layers as wide as the widest client's. Where not given,
        it follows from the class counts, see :func:`~fedmerge.matching.bayes.readiness`: 50, which about doubles the
        width, for clients with like data, and more the less their classes overlap; 50 without class counts.
    sweeps
        How often each client is matched anew, in random order.
    max_width
        Widest a layer may grow unless a client is wider; none by default.
    class_aware
        Whether clients send class counts, for the output layer.
    """

    def outgoing(self, state: State, unit: Unit, heads: Sequence[str]) -> list[Tensor]:
        """What goes from the neurons into output layers."""
        return [rows(state[s.parameter], s, {}) for s in unit.sites if s.role == "in" and s.parameter in heads]
