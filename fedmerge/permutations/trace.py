"""Derive the permutation symmetries of a model from its exported graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import ModelError
from fedmerge.permutations.buffers import moving_buffers
from fedmerge.permutations.grouping import groups_of, pinned_axes
from fedmerge.permutations.labels import Labels
from fedmerge.permutations.rules import RULES, Call, Outcome, tensors_in
from fedmerge.permutations.rules.pointwise import pointwise
from fedmerge.permutations.spec import PermutationSpec
from fedmerge.permutations.values import Value, constant, pin_all, settle
from fedmerge.permutations.verify import verify

__all__ = ["trace"]

Example = Tensor | tuple[Any, ...]
_CACHE: dict[str, PermutationSpec] = {}
_KEPT = 64


def trace(model: nn.Module, example: Example) -> PermutationSpec:
    """Find which neurons of a model may be re-ordered, and prove it on the example.

    The model is exported to a graph of ATen operators; every position of every parameter axis gets a label, each
    operator says which labels move together, and what an operator without a rule touches is pinned.

    Parameters
    ----------
    model
        Any module that ``torch.export`` can follow; it is not modified.
    example
        A batch of inputs, or a tuple of the arguments that the model is called with.

    Returns
    -------
    PermutationSpec
        Found once for each architecture and kept; verified every time.

    Raises
    ------
    ModelError
        The model cannot be exported, or the groups found turn out not to be symmetries.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> [(group.name, group.size) for group in trace(model, torch.zeros(2, 4)).groups]
    [('0.weight', 8)]
    """
    arguments = example if isinstance(example, tuple) else (example,)
    arguments = tuple(a[:2] if isinstance(a, Tensor) and a.ndim else a for a in arguments)
    key = _key(model, arguments)
    spec = _CACHE.get(key)
    if spec is not None:
        try:
            verify(spec, model, arguments)
        except ModelError:
            spec = None  # another model that looks the same, such as one with another closure
    if spec is None:
        spec = _derived(model, arguments)
        verify(spec, model, arguments)
    if len(_CACHE) >= _KEPT:
        _CACHE.pop(next(iter(_CACHE)))
    _CACHE[key] = spec
    return spec


def _key(model: nn.Module, arguments: tuple[Any, ...]) -> str:
    """What two models must have in common to have one graph: classes, settings, shapes."""
    parts = [str(type(model)), repr(model)]
    for name, module in model.named_modules():
        settings = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple)}
        settings.pop("training", None)
        parts.append(f"{name}:{type(module)}:{settings}")
    parts += [f"{name}:{tuple(tensor.shape)}" for name, tensor in model.state_dict().items()]
    parts += [f"{tuple(a.shape)}:{a.dtype}" if isinstance(a, Tensor) else repr(a) for a in arguments]
    return "\n".join(parts)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused transformer layer would be one opaque operator
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in flags:
            module.training = training


def _derived(model: nn.Module, arguments: tuple[Any, ...]) -> PermutationSpec:
    with _evaluating(model):
        try:
            program = torch.export.export(model, arguments, strict=False)
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} cannot be exported, so its symmetries cannot be derived ({error}): "
                "mend its forward, or write a PermutationSpec by hand"
            ) from error
    names, aliases = _canonical(model)
    signature = program.graph_signature
    parameters = {node: names[name] for node, name in signature.inputs_to_parameters.items()}
    buffers = {node: names.get(name, name) for node, name in signature.inputs_to_buffers.items()}
    movable = set(parameters.values()) | (moving_buffers(model) & set(buffers.values()))
    labels = Labels()
    unknown: list[str] = []
    values: dict[Any, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found = node.meta.get("val")
            shape = tuple(found.shape) if isinstance(found, Tensor) else ()
            known = parameters.get(node.name) or buffers.get(node.name)
            values[node] = Value(shape, name=known)
        elif node.op == "output":
            results = [values[n] for n in node.all_input_nodes]
            pin_all(labels, [v for r in results for v in tensors_in(r)], "it is an output of the model")
        elif node.op == "call_function":
            values[node] = _called(node, values, labels, movable, unknown)
        else:
            values[node] = constant(())
    classes = labels.classes()
    state = model.state_dict()
    return PermutationSpec(
        groups_of(labels, classes),
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        pinned=pinned_axes(labels, classes),
        aliases=aliases,
        unknown=tuple(dict.fromkeys(unknown)),
    )


def _canonical(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """One name for every shared tensor, and the further names it has."""
    seen: dict[int, str] = {}
    names, aliases = {}, {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        first = seen.setdefault(id(tensor), name)
        names[name] = first
        if first != name:
            aliases[name] = first
    return names, aliases


def _called(node: Any, values: dict[Any, Any], labels: Labels, parameters: set[str], unknown: list[str]) -> Outcome:
    if node.target.__name__ == "getitem":
        source, index = node.args
        found = values[source]
        return found[index] if isinstance(found, tuple) else constant(_shapes(node)[0])
    meta = node.meta.get("val")
    shapes = _shapes(node)

    def known(argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            return _labelled(values[argument], labels, parameters)
        if isinstance(argument, list | tuple):
            return [known(part) for part in argument]
        return argument

    if not hasattr(node.target, "_schema"):
        return tuple(constant(s) for s in shapes) if isinstance(meta, list | tuple) else constant(shapes[0])
    schema = node.target._schema
    given = dict(zip([a.name for a in schema.arguments], node.args, strict=False)) | dict(node.kwargs)
    arguments = {a.name: known(given.get(a.name, a.default_value)) for a in schema.arguments}
    operator = schema.name.partition("::")[2]
    call = Call(labels, operator, node.target, arguments, shapes, not isinstance(meta, list | tuple))
    rule = RULES.get(operator)
    if rule is None and torch.Tag.pointwise in node.target.tags:
        rule = pointwise
    if rule is not None:
        return rule(call)
    if any(v.factors for v in call.tensors):
        unknown.append(operator)
        pin_all(labels, call.tensors, f"there is no rule for {operator}")
    results = tuple(settle(labels, shape, []) for shape in shapes)
    return results[0] if call.single else results


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
