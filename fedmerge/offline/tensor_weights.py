"""Weights that differ from tensor to tensor: each group of tensors is merged by itself, by those that have a say."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedmerge.checks.validation import common_form
from fedmerge.errors import InvalidOption, shown
from fedmerge.layout import Layout, check_patterns, matching_names
from fedmerge.matching.widths import check_equal_widths
from fedmerge.merging import Pipeline, build_pipeline
from fedmerge.offline.arguments import as_weights
from fedmerge.offline.left_out import without_names
from fedmerge.registry import build, entries
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["TensorGroup", "check_tensor_by_tensor", "groups_of", "merged_apart"]


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are merged together, and what each model counts in them; 0 for one that has no part."""

    names: frozenset[str]
    weights: tuple[float, ...]


def groups_of(
    pattern_weights: Any, usual: Sequence[float], names: Iterable[str], tied: Mapping[str, str]
) -> list[TensorGroup]:
    """The tensors of these names, grouped by the weights that models have in them.

    Parameters
    ----------
    pattern_weights
        A number for each model by pattern, such as ``{"head.*": [1, 0]}``; of several that fit, the first counts.
    usual
        The weights of tensors that no pattern fits.
    names, tied
        Of a model's tensors, and the first names of shared ones by their further ones.

    Raises
    ------
    InvalidOption
        These are no weights by pattern, or no model has a say in some tensor.
    UnknownName
        A pattern is the name of no tensor.

    Examples
    --------
    >>> [sorted(group.names) for group in groups_of({"head": [1, 0]}, [1, 1], ["body.weight", "head.weight"], {})]
    [['body.weight'], ['head.weight']]
    """
    if not isinstance(pattern_weights, Mapping):
        raise InvalidOption(
            f'pattern_weights must be weights by pattern, such as {{"head.*": [1, 0]}}, got {shown(pattern_weights)}'
        )
    known = dict.fromkeys(names)
    weights_of: dict[str, tuple[float, ...]] = {}
    for pattern, each in pattern_weights.items():
        check_patterns([pattern], "pattern_weights")
        if each is None:
            raise InvalidOption(f"pattern_weights[{pattern!r}] must be a number for each model, got None")
        weights = tuple(as_weights(each, len(usual), f"pattern_weights[{pattern!r}]"))
        if not any(weights):
            raise InvalidOption(f"pattern_weights[{pattern!r}] is 0 for all models: at least one must have a say")
        for name in matching_names(dict.fromkeys(known), [pattern], tied, "pattern_weights"):  # type: ignore[arg-type]
            weights_of.setdefault(name, weights)
    by_weights: dict[tuple[float, ...], set[str]] = {}
    for name in known:
        by_weights.setdefault(weights_of.get(name, tuple(usual)), set()).add(name)
    return [TensorGroup(frozenset(group_names), weights) for weights, group_names in by_weights.items()]


def check_tensor_by_tensor(what: str, method: str, pipeline: Pipeline) -> None:
    """Make sure that a method merges each tensor by itself, so that tensors may be merged apart.

    Raises
    ------
    InvalidOption
        It does not; the error says why, and names methods that do.
    """
    aggregator = pipeline.aggregator
    beside = [*(e for e in pipeline.edits if not e.tensor_by_tensor), *pipeline.server_steps, *pipeline.trajectories]
    if aggregator.requires_model:
        reason = "re-orders the neurons of whole models"
    elif aggregator.several_exchanges or pipeline.refinements:
        reason = "asks clients about the whole model"
    elif beside or aggregator.separable == "never":
        named = f", in {type(beside[0]).__name__}," if beside and aggregator.separable != "never" else ""
        reason = f"looks at the whole model{named} and not at one tensor after the other"
    else:
        return
    made = {name: build("aggregator", name, {}) for name in entries("aggregator")}
    able = [
        name for name, part in made.items() if part.separable != "never" and not part.refined_by and not part.local_rule
    ]
    raise InvalidOption(f"{what} goes with no method that {reason}, as {method} does: take one of {', '.join(able)}")


def _check_layers(pipeline: Pipeline, groups: Sequence[TensorGroup], buffers: Collection[str], method: str) -> None:
    """Make sure that layers are whole, where a method merges what is in one together."""
    if pipeline.aggregator.separable != "layer":
        return
    home: dict[str, TensorGroup] = {}
    for name, own in ((name, group) for group in groups for name in group.names - set(buffers)):
        layer, _, last = name.rpartition(".")
        if not last.startswith(("weight", "bias")):  # what stands by itself, such as a temperature
            continue
        if home.setdefault(layer, own) is not own:
            raise InvalidOption(
                f"{method} merges a layer's weight and bias together, and pattern_weights tells those of {layer!r} "
                f"apart: name the layer, as {layer!r}"
            )


def merged_apart(
    pipeline: Pipeline,
    groups: Sequence[TensorGroup],
    updates: Sequence[ClientUpdate],
    context: MergeContext,
    buffers: Collection[str],
    method: str,
) -> dict[str, Tensor]:
    """Merge each group of tensors by itself.

    Raises
    ------
    BadUpdate
        A model that has a say in a tensor does not fit the others there.
    """
    merged: dict[str, Tensor] = {}
    _check_layers(pipeline, groups, buffers, method)
    for group in groups:
        base = None if context.base is None else _those(context.base, group.names)
        members = [
            _restricted(update, group.names, weight)
            for update, weight in zip(updates, group.weights, strict=True)
            if weight
        ]
        reference = base or common_form([member.state for member in members])
        check_equal_widths([member.state for member in members], reference, method)
        own = [name for name in buffers if name in group.names]
        tied = {alias: name for alias, name in context.tied.items() if alias in group.names}
        there = replace(context, base=base, tied=tied, frozen=context.frozen & group.names, layout=None, model_fn=None)
        # Buffers are merged alike whatever the method, which may want to see at least one parameter.
        parameters = Layout.of(reference, own, tied).parameters
        fitting = pipeline if parameters else build_pipeline("fedavg", on_bad_update="raise")
        merged |= fitting.merge(members, there, buffers=own).state
    return merged


def _those(state: State, names: Collection[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name in names}


def _restricted(update: ClientUpdate, names: Collection[str], weight: float) -> ClientUpdate:
    """What a model has of some tensors, with the weight that it has in them."""
    others = [name for name in update.state if name not in names]
    statistics = {kind: without_names(value, others) for kind, value in update.statistics.items()}
    return replace(update, state=_those(update.state, names), weight=weight, statistics=statistics)
