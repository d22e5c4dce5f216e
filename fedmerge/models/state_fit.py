"""Whether the tensors of a file are of the kinds that a model has, and what tied tensors are that stand there once."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fedmerge.errors import ModelError
from fedmerge.state import State, module_state

__all__ = ["check_kinds", "tied_tensors"]

_OTHER_KIND = {
    ("integer", "float"): "whole numbers, such as codes of a quantised model, have no mean. Dequantise it",
    ("complex", "float"): "its imaginary part would be lost. Build the model with complex tensors, or split it in two",
    ("float", "complex"): "it lacks an imaginary part. Make it complex",
    ("float", "integer"): "its fractions would be lost. Save it as whole numbers",
}
"""By the kind that a file has and the kind that the model wants: why not, and what to do."""


def check_kinds(file: Path | str, module: nn.Module, state: State) -> None:
    """Refuse tensors of another kind than the model's, which turning them into it would spoil.

    Raises
    ------
    ModelError
        There is one.
    """
    for name, tensor in module_state(module)[0].items():
        kinds = (_kind(state[name]), _kind(tensor)) if name in state else ("", "")
        if kinds[0] != kinds[1]:
            why = _OTHER_KIND.get(kinds, "the two have nothing in common. Save it as the model has it")
            raise ModelError(
                f"{file}: {name!r} is {state[name].dtype}, in the model {tensor.dtype}: {why} before the merge"
            )


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "float" if tensor.is_floating_point() else "integer"


def tied_tensors(file: Path | str, module: nn.Module, state: State) -> dict[str, Tensor]:
    """Tensors that a file names once and the model twice, as tied weights are saved.

    Raises
    ------
    ModelError
        The file has two, and they differ.
    """
    of: dict[int, str] = {}
    own = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    for name, tensor in own.items():
        if name in state:
            first = of.setdefault(id(tensor), name)
            if not torch.equal(state[first].nan_to_num(), state[name].nan_to_num()):
                raise ModelError(
                    f"{file}: {first!r} and {name!r} are one tensor in the model, and differ in the file, which was "
                    "trained with the tie cut: build the model without the tie (--model, --set model.option=value), or "
                    f"save the file without {name!r}"
                )
    return {name: state[of[id(tensor)]] for name, tensor in own.items() if name not in state and id(tensor) in of}
