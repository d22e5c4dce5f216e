"""CLAFusion: models of unequal depth, made equally deep without effect, then fused by optimal transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedmerge.aggregators.otfusion import OTFusion
from fedmerge.registry import register

__all__ = ["CLAFusion"]


@register("clafusion", paper="arXiv:2110.15538")
@dataclass(frozen=True)
class CLAFusion(OTFusion):
    """Layers matched across depths, layers without effect put in where one is missing; then OT fusion.

    Nguyen et al. 2021, section 3. The layers of a shallower model are matched in order with those of the deepest, first
    to first and last to last, by the least sum of ``1 - CKA`` of what they say. Into the gaps go layers that change
    nothing: identities, kernels of one, residual blocks of zero, see :func:`~fedmerge.matching.deepening.deepened`.
    Then all have one form, and :class:`OTFusion` merges them, whose widths may differ too. What layers say is heard on
    the server's data, or on standard normal inputs where it has none.

    In a federation the model is as deep as the deepest client. Clients put in the layers before they send, and hear
    them on their own examples.

    Parameters
    ----------
    ground, solver, regularization, importance, fusion, examples
        See :class:`OTFusion`.
    """

    may_change_depth: ClassVar[bool] = True
