"""Models at hand of which only a part is merged, or parts with other weights, or rows that they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.merging import Pipeline
from fedmerge.offline.arguments import check_signs
from fedmerge.offline.at_hand import AtHand
from fedmerge.offline.left_out import layout_without
from fedmerge.offline.rows import check_rows, merged_rows, row_labels
from fedmerge.offline.tensor_weights import TensorGroup, check_tensor_by_tensor, groups_of, merged_apart
from fedmerge.routing import Routing
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["check_parts", "merged_state"]


def check_parts(hand: AtHand, pipeline: Pipeline, method: str, pattern_weights: Any, rows: Any, *, asks: bool) -> None:
    """Make sure that a method can merge parts, before anything is measured; `asks`, whether there are clients to ask.

    Raises
    ------
    InvalidOption
        It looks at whole models, where tensors are to be merged apart; or it trains the merged model further, and
        what is left out is not the same in all; or a refinement fits a head that is left out.
    """
    for what, option in (("pattern_weights=", pattern_weights), ("rows=", rows)):
        if option is not None:
            check_tensor_by_tensor(what, method, pipeline)
    if rows is not None:
        check_rows(method, pipeline)
    if not asks or not hand.left:
        return
    if hand.apart is not None and pipeline.aggregator.several_exchanges:
        raise InvalidOption(
            f"{method} has clients train the merged model further, and {hand.apart!r}, which is left out, is not the "
            "same in all models: only one of them could. Take a method that asks once, such as fisher or regmean"
        )
    matrices = [name for name, parameter in hand.models[0].named_parameters() if parameter.ndim > 1]
    fitted = [type(refinement).__name__ for refinement in pipeline.refinements if refinement.fits_head]
    if fitted and matrices and matrices[-1] in hand.left:
        raise InvalidOption(
            f"{method}: {fitted[0]} fits the head, and {matrices[-1]!r} is left out, so that it stays as it is: leave "
            "out other tensors, or take a refinement of the layers before, such as recalibrate or sequential_refit"
        )


def merged_state(
    pipeline: Pipeline,
    hand: AtHand,
    updates: Sequence[ClientUpdate],
    context: MergeContext,
    method: str,
    pattern_weights: Any = None,
    rows: Any = None,
) -> tuple[dict[str, Tensor], Routing | None]:
    """The tensors of the merged model, and its routing where the method makes one.

    Parameters
    ----------
    pattern_weights
        Weights by pattern, see :func:`~fedmerge.offline.tensor_weights.groups_of`.
    rows
        Labels of rows by tensor, see :func:`~fedmerge.offline.rows.row_labels`.
    """
    if pattern_weights is None and rows is None:
        if hand.left:
            layout = layout_without(hand.states[0], hand.buffers, hand.tied, hand.left)
            context = replace(context, layout=layout)
        result = pipeline.merge(updates, context, buffers=hand.buffers)
        return dict(result.state), result.routing
    usual = [update.weight for update in updates]
    names = [name for name in dict.fromkeys(n for state in hand.states for n in state) if name not in hand.left]
    groups = groups_of({} if pattern_weights is None else pattern_weights, usual, names, hand.tied)
    for group in groups:
        check_signs(group.weights, method, pipeline.aggregator)
    left = [name for name in rows if name in hand.left] if isinstance(rows, Mapping) else []
    if left:
        raise InvalidOption(f"rows merges rows of {left[0]!r}, which is left out: name it in one of the two")
    labels = {} if rows is None else row_labels(rows, hand.states, hand.tied)
    taken = {name for name in names if hand.tied.get(name, name) in labels}
    others = [TensorGroup(group.names - taken, group.weights) for group in groups if group.names - taken]
    state = merged_apart(pipeline, others, updates, context, hand.buffers, method)
    for name, each in labels.items():
        weights = next(group.weights for group in groups if name in group.names)
        merged = merged_rows(pipeline, name, [model_state[name] for model_state in hand.states], each, weights, context)
        state |= {alias: merged for alias in taken if hand.tied.get(alias, alias) == name}
    return {**{name: tensor for name, tensor in hand.states[0].items() if name in hand.left}, **state}, None
