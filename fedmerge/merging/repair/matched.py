"""What follows a merge of re-ordered neurons: activations brought back to the size that they had."""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import Tensor

from fedmerge.merging.repair.recalibrated import has_batch_norm, recalibrated
from fedmerge.merging.repair.rescale import Rescale
from fedmerge.state import cast_like, is_sane
from fedmerge.update import MergeContext

__all__ = ["repair_matched"]

log = logging.getLogger("fedmerge")


def repair_matched(
    state: dict[str, Tensor],
    context: MergeContext,
    method: str,
    rescale: Rescale | None,
    *,
    norms: bool,
    frozen: Collection[str] = (),
) -> None:
    """Repair a merged state in place.

    Parameters
    ----------
    state
        Parameters and buffers of the merged model.
    context
        Knows the model, and the server's data where there are any.
    method
        What merged, for messages.
    rescale
        What was heard of the models before they were merged, where every layer is to be corrected.
    norms
        Whether statistics of batch norm are to be measured here.
    frozen
        Names of tensors that stay as they are.
    """
    if rescale is not None:
        found = cast_like(rescale.finish(context.module(state, method), frozen), state)
        if all(map(is_sane, found.values())):
            state.update(found)
        else:
            log.warning("%s: layers are too loud, or silent, to be rescaled: they stay as merged", method)
    if not norms or not has_batch_norm(state):
        return
    if context.data is None or context.model_fn is None:
        log.warning(
            "%s: statistics of batch norm are averages, which do not fit a merged model: pass data=, or have the "
            'clients measure them with +recalibrate behind the method, or batch_norm="recalibrate"',
            method,
        )
        return
    measured = recalibrated(context.module(state, method), context.inputs(method))
    measured = cast_like({n: t for n, t in measured.items() if n in state and n not in frozen}, state)
    if all(map(is_sane, measured.values())):
        state.update(measured)
    else:
        log.warning("%s: batch norms cannot be measured, as layers overflow: they stay as merged", method)
