"""Derive the permutation symmetries of a model from its exported graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import ModelError
from fedmerge.inputs import changed
from fedmerge.models.tangent import is_linearised
from fedmerge.permutations.buffer_axes import moving_buffers
from fedmerge.permutations.doings import doings
from fedmerge.permutations.export import Exported, exported
from fedmerge.permutations.grouping import groups_of, pinned_axes
from fedmerge.permutations.labels import Labels
from fedmerge.permutations.rules import RULES, Call, Outcome, tensors_in
from fedmerge.permutations.rules.pointwise import pointwise
from fedmerge.permutations.running import copied, few_rows, undisturbed
from fedmerge.permutations.spec import PermutationSpec
from fedmerge.permutations.values import Value, constant, pin_all, settle
from fedmerge.permutations.verify import verify

__all__ = ["trace"]

_CACHE: dict[str, PermutationSpec] = {}
_KEPT = 64


def trace(model: nn.Module, example: Any) -> PermutationSpec:
    """Find which neurons of a model may be re-ordered, and prove it on the example.

    The model is exported to a graph of ATen operators; every position of every parameter axis gets a label, each
    operator says which labels move together, and what an operator without a rule touches is pinned.

    Parameters
    ----------
    model
        Any module that ``torch.export`` can follow; it is not modified.
    example
        What the model is called with: a batch of inputs, a tuple of arguments, a mapping of keywords, or a nest of
        these as its one argument, see :func:`~fedmerge.inputs.arguments_of`. Of a batch two rows are used, of an
        example whose first axis is something else all of it.

    Returns
    -------
    PermutationSpec
        Found once for models that do the same, operator by operator, and kept; verified every time.

    Raises
    ------
    ModelError
        The model is linearised or cannot be exported, or the groups found turn out not to be symmetries.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> [(group.name, group.size) for group in trace(model, torch.zeros(2, 4)).groups]
    [('0.weight', 8)]
    """
    if is_linearised(model):
        raise ModelError(
            "the neurons of a linearised model cannot be re-ordered, for those of the fixed point that it is expanded "
            "around stay as they are: take a method that does not match neurons, such as fedavg"
        )
    with undisturbed():
        own = copied(model)
        device = next((tensor.device for tensor in own.state_dict().values()), torch.device("cpu"))
        example = few_rows(own, changed(example, lambda tensor: tensor.detach().to(device)))
        with torch.enable_grad():
            key = doings(copied(model), example)
            spec = _CACHE.get(key) if key is not None else None
            if spec is None:
                spec = _derived(copied(model), example)
    verify(spec, model, example)
    if key is not None:
        if len(_CACHE) >= _KEPT:
            _CACHE.pop(next(iter(_CACHE)))
        _CACHE[key] = spec
    return spec


def _derived(model: nn.Module, example: Any) -> PermutationSpec:
    program = exported(model, example)
    labels = Labels()
    unknown: list[str] = []
    movable = set(program.parameters.values()) | (moving_buffers(model) & set(program.buffers.values()))
    for result in _walked(program, movable, labels, unknown):
        pin_all(labels, list(tensors_in(result)), "it is an output of the model")
    classes = labels.classes()
    state = model.state_dict()
    return PermutationSpec(
        groups_of(labels, classes),
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        pinned=pinned_axes(labels, classes),
        aliases=program.aliases,
        unknown=tuple(dict.fromkeys(unknown)),
    )


def _walked(program: Exported, movable: set[str], labels: Labels, unknown: list[str]) -> Iterator[Any]:
    """Apply the rules from node to node; the values of the outputs."""
    values: dict[Any, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            meta = node.meta.get("val")
            known = program.parameters.get(node.name) or program.buffers.get(node.name)
            values[node] = Value(tuple(meta.shape) if isinstance(meta, Tensor) else (), name=known)
        elif node.op == "output":
            yield from (values[n] for n in node.all_input_nodes)
        elif node.op == "call_function":
            values[node] = _called(node, values, labels, movable, unknown)
        else:
            values[node] = constant(())


def _called(node: Any, values: Mapping[Any, Any], labels: Labels, parameters: set[str], unknown: list[str]) -> Outcome:
    if node.target.__name__ == "getitem":
        source, index = node.args
        value = values[source]
        return value[index] if isinstance(value, tuple) else constant(_shapes(node)[0])
    meta = node.meta.get("val")
    shapes, single = _shapes(node), not isinstance(meta, list | tuple)

    def known(argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            return _labelled(values[argument], labels, parameters)
        if isinstance(argument, list | tuple):
            return [known(part) for part in argument]
        return argument

    schema = getattr(node.target, "_schema", None)
    if schema is None:  # a block of operators, such as a loop
        return _unruled(node.target.__name__, [known(n) for n in node.all_input_nodes], shapes, single, labels, unknown)
    if not schema.returns and not schema.is_mutable:
        return constant(())  # a check, such as that of a dtype where a cast stood: it computes nothing
    bound = dict(zip([a.name for a in schema.arguments], node.args, strict=False)) | dict(node.kwargs)
    arguments = {a.name: known(bound.get(a.name, a.default_value)) for a in schema.arguments}
    operator = schema.name.partition("::")[2]
    call = Call(labels, operator, node.target, arguments, shapes, single)
    rule = RULES.get(operator)
    if rule is None and torch.Tag.pointwise in node.target.tags:
        rule = pointwise
    if rule is not None:
        return rule(call)
    return _unruled(operator, call.tensors, shapes, single, labels, unknown)


def _unruled(
    operator: str,
    tensors: list[Value],
    shapes: tuple[tuple[int, ...], ...],
    single: bool,
    labels: Labels,
    unknown: list[str],
) -> Outcome:
    """Safe where nothing is known: all that goes in is pinned."""
    if any(isinstance(v, Value) and v.factors for v in tensors):
        unknown.append(operator)
        pin_all(labels, list(tensors_in(tensors)), f"there is no rule for {operator}")
    results = tuple(settle(labels, shape, []) for shape in shapes)
    return results[0] if single else results


def _shapes(node: Any) -> tuple[tuple[int, ...], ...]:
    meta = node.meta.get("val")
    parts = meta if isinstance(meta, list | tuple) else [meta]
    return tuple(tuple(int(s) for s in p.shape) if isinstance(p, Tensor) else () for p in parts)


def _labelled(value: Any, labels: Labels, parameters: set[str]) -> Any:
    """A parameter gets its labels when it is first used, so that labels grow from input to output."""
    if not isinstance(value, Value) or value.name not in parameters or value.factors:
        return value
    factors = []
    for axis, size in enumerate(value.shape):
        vector = labels.site(value.name, axis, size)
        if size > 1:
            factors.append(vector.reshape([-1 if a == axis else 1 for a in range(len(value.shape))]))
        else:
            labels.pin(vector, "it stands alone")
    return Value(value.shape, tuple(factors), name=value.name)
