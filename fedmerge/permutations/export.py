"""A model's graph of ATen operators, from an example of any form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import ModelError
from fedmerge.inputs import arguments_of, changed, tensors_of

__all__ = ["Exported", "exported"]


@dataclass(frozen=True)
class Exported:
    """A graph, and what its placeholders stand for.

    Parameters
    ----------
    graph
        Of operators without side effects on what is used after them.
    parameters, buffers
        Names in the model, by name of the placeholder; of a shared tensor, its first name.
    aliases
        First names of shared tensors by their further names.
    """

    graph: torch.fx.Graph
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    aliases: Mapping[str, str]


class _Flat(nn.Module):
    """A model from a flat list of tensors to another: torch.export takes nests only of kinds that it was told of."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model, self._given = model, (args, kwargs)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """All tensors of the model's outputs, in order."""
        left = iter(tensors)
        args, kwargs = changed(self._given, lambda _: next(left))
        return tensors_of(self.model(*args, **kwargs))


def exported(model: nn.Module, example: Any) -> Exported:
    """Export a model.

    Parameters
    ----------
    model
        A copy, in eval mode.
    example
        On its device.

    Raises
    ------
    ModelError
        ``torch.export`` cannot follow the model.
    """
    arguments = arguments_of(model, example)
    try:
        program = torch.export.export(_Flat(model, *arguments), tuple(tensors_of(arguments)), strict=False)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be exported, so its symmetries cannot be derived ({error}): "
            "mend its forward, or write a PermutationSpec by hand"
        ) from error
    if any(_has_side_effects(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # decomposes nothing, but leaves no blocks and writes to no views
    names, aliases = _first_names(model)
    signature = program.graph_signature
    own = {node: name.removeprefix("model.") for node, name in signature.inputs_to_parameters.items()}
    buffers = {node: name.removeprefix("model.") for node, name in signature.inputs_to_buffers.items()}
    return Exported(
        program.graph,
        {node: names[name] for node, name in own.items()},
        {node: names.get(name, name) for node, name in buffers.items()},
        aliases,
    )


def _has_side_effects(node: Any) -> bool:
    """Whether a node is a block of others (``with torch.no_grad():``), or writes into what is used after it."""
    if node.op != "call_function" or node.target.__name__ == "getitem":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return bool(node.all_input_nodes)
    if not schema.is_mutable:
        return False
    written = node.args[0] if node.args else None
    if not node.users or not isinstance(written, torch.fx.Node):
        return True
    return any(user > node for user in written.users if user is not node) or written.op == "placeholder"


def _first_names(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
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
